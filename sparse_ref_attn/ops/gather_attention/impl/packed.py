"""Every item's queries together, and its dense and kept keys together, without reading an offset on the host.

Attention kernels for packed batches want item 0's rows, then item 1's. A stable sort of the item that each row belongs
to brings rows into that order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import Arguments
from ..gradients import Gradients, Wanted, sum_rows

__all__ = ["Packed", "pack", "unpack_gradients"]


class Packed(NamedTuple):
    """Operands in item order.

    ``q_order`` (T,) is the row of q at each packed place, None where q is packed already. ``places`` holds, for each
    dense tensor and then for the selection, where its rows went among the keys. ``q_items`` and ``k_items`` say which
    item each packed row belongs to.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    q_order: Tensor | None
    places: list[Tensor]
    q_items: Tensor
    k_items: Tensor

    def take(self, x: Tensor) -> Tensor:
        """Rows of x (T, ...) in packed order."""
        return x if self.q_order is None else x[self.q_order]

    def put_back(self, x: Tensor) -> Tensor:
        """Packed rows x (T, ...) in the order of q."""
        return x.contiguous() if self.q_order is None else torch.empty_like(x).index_copy_(0, self.q_order, x)


def pack(a: Arguments) -> Packed:
    """Sort queries and keys by item; selections are shared by all heads."""
    q_items = _items_of(a.cu_seqlens_q, a.q.shape[0])
    q_order = None if a.cu_seqlens_q.shape[0] == 1 else torch.argsort(q_items, stable=True)
    owners = [_items_of(cu, k.shape[0]) for k, _, cu in a.segments]
    keys, values = [k for k, _, _ in a.segments], [v for _, v, _ in a.segments]
    if a.ref_indices is not None:
        assert a.ref_offsets is not None
        assert a.k_ref is not None
        assert a.v_ref is not None
        owners.append(_items_of(a.ref_offsets, a.ref_indices.shape[0]))
        keys.append(a.k_ref.index_select(0, a.ref_indices))
        values.append(a.v_ref.index_select(0, a.ref_indices))
    owner = torch.cat(owners)
    order = torch.argsort(owner, stable=True)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(order.shape[0], device=order.device))
    places = list(place.split([x.shape[0] for x in keys]))
    k, v = (torch.empty((order.shape[0], *x[0].shape[1:]), dtype=a.q.dtype, device=a.q.device) for x in (keys, values))
    for at, one_k, one_v in zip(places, keys, values, strict=True):
        k.index_copy_(0, at, one_k)
        v.index_copy_(0, at, one_v)
    q_items, k_items = (q_items if q_order is None else q_items[q_order]), owner[order]
    edges = torch.arange(a.items + 1, device=a.q.device)
    cu_q, cu_k = (torch.searchsorted(x, edges).int() for x in (q_items, k_items))
    return Packed(a.q if q_order is None else a.q[q_order], k, v, cu_q, cu_k, q_order, places, q_items, k_items)


def unpack_gradients(a: Arguments, p: Packed, dq: Tensor, dk: Tensor, dv: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of the packed operands, as gradients of the given ones."""
    dense: list[Tensor | None] = [None] * 4
    if wanted.dense:
        for n in range(len(a.segments)):
            dense[2 * n : 2 * n + 2] = dk[p.places[n]], dv[p.places[n]]
    bank: list[Tensor | None] = [None, None]
    if wanted.bank and a.ref_indices is not None and a.k_ref is not None:
        size, at = a.k_ref.shape[0], p.places[-1]
        bank = [
            sum_rows(x[at].flatten(1), a.ref_indices, size, a.distinct).to(a.q.dtype).view(a.k_ref.shape)
            for x in (dk, dv)
        ]
    return Gradients(p.put_back(dq) if wanted.q else None, *dense, *bank)


def _items_of(cu: Tensor, rows: int) -> Tensor:
    """The item of each row (rows,), from offsets (P, B + 1) that tile the rows."""
    ends = cu[:, 1:].flatten().contiguous()
    slot = torch.searchsorted(ends, torch.arange(rows, device=cu.device, dtype=cu.dtype), right=True)
    return slot % (cu.shape[1] - 1)
