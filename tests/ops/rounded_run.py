"""The same random roundings (`rounding`) in whatever a model computes: after every operation of a run in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .rounding import U

__all__ = ["of_run"]

DRAWS = 16
aten = torch.ops.aten
# which argument of a product is summed over, in its last dim
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
SUMS = {aten.sum, aten.mean}


class Rounded(TorchDispatchMode):
    """Every result is rounded at random; products and sums as sums of so many terms."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func._schema.is_mutable:
            return out
        op = func.overloadpacket
        if op in PRODUCTS or op in SUMS:
            sizes = func(*(x.abs() if isinstance(x, Tensor) else x for x in args), **kwargs)
            terms = args[PRODUCTS[op]].shape[-1] if op in PRODUCTS else args[0].numel() / max(out.numel(), 1)
            return self.off(out, sizes * (1 + terms / 3) ** 0.5)
        if isinstance(out, Tensor):
            return self.off(out, out.abs()) if out.is_floating_point() else out
        if isinstance(out, tuple | list):
            return type(out)(
                self.off(x, x.abs()) if isinstance(x, Tensor) and x.is_floating_point() else x for x in out
            )
        return out

    def off(self, x: Tensor, size: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return x
        drawn = torch.randn(x.shape, generator=self.generator, dtype=torch.float32).double()
        # exact in float32, such as a time or a position: not rounded
        return torch.where(x == x.float(), x, torch.addcmul(x, size, drawn, value=U))


def of_run(run: Callable[[], Tensor]) -> Tensor:
    """The largest standard deviation of an element of what a float64 `run` gives, in the shape of its result."""
    exact = run()
    assert exact.dtype == torch.float64
    squares = torch.zeros_like(exact)
    for seed in range(DRAWS):
        with Rounded(seed):
            got = run()
        squares += (got - exact).square()
    return (squares / DRAWS).sqrt().amax().expand(exact.shape)
