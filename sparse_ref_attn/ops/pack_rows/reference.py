"""The definition: index_select and index_copy."""

from __future__ import annotations

from torch import Tensor

__all__ = ["pack_reference", "unpack_reference"]


def pack_reference(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Rows of x along dim, differentiable."""
    return x.index_select(dim, rows)


def unpack_reference(y: Tensor, rows: Tensor, size: int, dim: int) -> Tensor:
    """Zeros of `size` rows along dim, with y in `rows`, differentiable."""
    shape = list(y.shape)
    shape[dim] = size
    return y.new_zeros(shape).index_copy(dim, rows.long(), y)
