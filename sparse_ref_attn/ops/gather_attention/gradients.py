"""Gradients of the op's tensors, and the sum of packed rows into the bank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Gradients", "Wanted", "sum_rows"]


class Wanted(NamedTuple):
    """Which gradients somebody asked for: of q, of the dense keys and values, of the bank."""

    q: bool
    dense: bool
    bank: bool


class Gradients(NamedTuple):
    """Gradients of q, k, v, k2, v2, k_ref, v_ref; None where there is no such tensor or nobody asked."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    k2: Tensor | None = None
    v2: Tensor | None = None
    k_ref: Tensor | None = None
    v_ref: Tensor | None = None


def sum_rows(packed: Tensor, rows: Tensor, size: int, distinct: bool) -> Tensor:
    """out[r] = sum of packed[i] over rows[i] == r, in a fixed order: packed (n, W), rows (n,) -> (size, W).

    Summed in float32 at least. With `distinct`, no row is named twice and rows are stored, not summed.
    """
    if distinct:
        return packed.new_zeros(size, packed.shape[1]).index_copy_(0, rows.long(), packed)
    out = packed.new_zeros(size, packed.shape[1], dtype=torch.promote_types(packed.dtype, torch.float32))
    rows, packed = rows.long(), packed.to(out.dtype)
    if packed.device.type == "cuda":
        out.index_put_((rows,), packed, accumulate=True)  # sorts, so its order is fixed; index_add_ uses atomics
    else:
        out.index_add_(0, rows, packed)
    return out
