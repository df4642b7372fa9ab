"""A tensor as a Triton kernel takes it: its data and its strides are one argument, named as in `abi.Tensor` of csrc."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Operand", "precision", "row_offsets", "rows_of", "wide"]


class Operand(NamedTuple):
    """Data, and strides in elements; those of the channels are 1. Without data the kernel is compiled without it.

    Triton specialises each stride as it would an argument of its own, and passes those below 2^31 as int32: a kernel
    multiplies them with int64 numbers of rows, heads and items.
    """

    data: Tensor | None = None
    row: int = 0
    head: int = 0
    item: int = 0


@triton.jit
def wide(stride):
    """A stride as int64, never below 0.

    Where that is left to the products, the compiler extends the sign, and the forward's loop on sm_80 spills.
    """
    stride = tl.cast(0, tl.int32) + stride  # 1 is a constant
    if stride.dtype == tl.int32:
        stride = tl.cast(tl.cast(stride, tl.uint32), tl.int64)
    return stride


@triton.jit
def row_offsets(rows, row_stride, C: tl.constexpr):
    """Row numbers [N] -> element offsets [N, C], int64 before the product."""
    return tl.cast(rows, tl.int64)[:, None] * row_stride + tl.arange(0, C)[None, :]


@triton.jit
def rows_of(X, head, rows, C: tl.constexpr):
    """Pointers [N, C] to rows [N] of one head, int64, of the operand X."""
    return X.data + head * X.head + row_offsets(rows, X.row, C)


def precision(x: Tensor) -> str:
    """Of matrix steps: only float32 has a choice, and runs under the interpreter only."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
