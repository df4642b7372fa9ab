"""Buffers that tell when a kernel reads or writes where it should not.

The interpreter sees neither an out-of-bounds store nor a read of memory that nobody wrote: the tests make both visible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Canaries", "in_nan"]

BORDER = 4096  # bytes on either side; keeps the 16-byte alignment
CANARY = 0xA5
EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}
FILLED = {torch.zeros, torch.zeros_like, Tensor.new_zeros, torch.full, torch.full_like, Tensor.new_full}


class Canaries(TorchFunctionMode):
    """Within this context every new tensor lies between canary borders, and an empty one is full of NaN.

    Works on what runs directly in the context: call the kernel's launcher, not the registered op (whose inside torch
    hides from function modes). Leaving the context fails if a border was written.

    Examples
    --------
    >>> with Canaries():
    ...     x = torch.empty(3)
    >>> x.isnan().all().item()
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in EMPTY and func not in FILLED:
            return out
        reach = 1 + sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True)) if out.numel() else 0
        raw = torch.full((2 * BORDER + reach * out.element_size(),), CANARY, dtype=torch.uint8, device=out.device)
        self.buffers.append((f"{func.__name__}{tuple(out.shape)}", raw))
        inner = raw[BORDER : raw.numel() - BORDER].view(out.dtype)
        guarded = inner.as_strided(out.shape, out.stride())
        if func in FILLED:
            guarded.copy_(out)
        elif out.dtype.is_floating_point:
            guarded.fill_(float("nan"))
        return guarded

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if kind is not None:
            return
        for name, raw in self.buffers:
            for side, border in (("before", raw[:BORDER]), ("after", raw[-BORDER:])):
                hit = (border != CANARY).nonzero()
                assert not hit.numel(), f"{len(hit)} bytes written {side} the tensor of {name}"


def in_nan(x: Tensor, gap: int = 8) -> Tensor:
    """`x` inside a buffer of NaN: `gap` elements after each row of the last dim, and a border before and after.

    Values equal `x`; strides are those of rows `gap` longer, so that nothing is contiguous beyond the last dim.
    With ``gap`` a multiple of 8 16-bit rows keep their 16-byte alignment.
    """
    width = x.shape[-1] + gap
    rows = x.numel() // max(x.shape[-1], 1)
    border = BORDER // x.element_size()
    flat = x.new_full((2 * border + rows * width,), float("nan"))
    strides = [width] * x.ndim
    strides[-1] = 1
    for dim in range(x.ndim - 3, -1, -1):
        strides[dim] = strides[dim + 1] * x.shape[dim + 1]
    out = flat.as_strided(x.shape, strides, border)
    return out.copy_(x)
