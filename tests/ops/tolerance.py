"""How far off a half-precision kernel may be: at most twice as far as plain PyTorch in the same precision.

No hand-tuned numbers. Results in float32 are judged by `rounding`: plain PyTorch has no more to lose there than a
kernel, and is now and then exact by luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_as_accurate"]


def assert_as_accurate(actual: Tensor, truth: Tensor, low: Tensor, name: str = "result") -> None:
    """flash-attention's rule: err <= 2 x err(low) + 2 x |t + 0.3 - 0.3 - t|.

    Parameters
    ----------
    actual : Tensor
        What the kernel computed.
    truth : Tensor, float64
        The same from the formula in float64, from the same (rounded) inputs.
    low : Tensor
        The same from plain PyTorch in the inputs' precision, not widened.
    name : str
        Opens the message.

    Notes
    -----
    The second term is one rounding at 0.3 in the dtype of `low`; it matters where plain PyTorch happens to be exact.
    Infinities must agree exactly, NaN is never accepted.
    """
    assert truth.dtype == torch.float64, f"truth must be float64, got {truth.dtype}"
    assert actual.shape == truth.shape == low.shape, f"{name}: {actual.shape}, {truth.shape}, {low.shape}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} are NaN"
    infinite = truth.isinf()
    assert torch.equal(actual.double()[infinite], truth[infinite]), f"{name}: infinities differ"
    actual, truth, low = (t[~infinite] for t in (actual, truth, low))
    if not truth.numel():
        return
    rounded = truth.to(low.dtype)
    slack = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().double()
    error = (actual.double() - truth).abs().max()
    allowed = 2 * (low.double() - truth).abs().max() + slack
    assert error <= allowed, f"{name}: error {error:.3e}, plain PyTorch's in this precision allows {allowed:.3e}"
