"""Gather each item's kept keys and values once, then attend with PyTorch's best dense kernel.

Keys and values of an item are written straight into one buffer (dense rows copied, bank rows gathered), so nothing is
copied twice. Per-head selections run head by head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..arguments import Arguments, HostLayout
from ..gradients import Gradients, Wanted, sum_rows
from .dense_attention import attend, attend_backward
from .sdpa_tiles import forward_of_tiles

__all__ = ["backward", "forward"]


def forward(a: Arguments, layout: HostLayout | None = None) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T), contiguous."""
    layout = HostLayout.of(a) if layout is None else layout
    if a.cu_tiles is not None:
        return forward_of_tiles(a, layout, forward)
    rows, heads, _ = a.q.shape
    out: Tensor | None = None
    lse: Tensor | None = None
    for item, head in _problems(a):
        at, span = layout.query_rows(item), _heads(a, head)
        k, v = _gather(a, layout, item, head)
        o, total = attend(_take(a.q, at)[:, span], k, v, a.scale)
        if o.shape == a.q.shape:  # the only problem: no second copy
            return o.contiguous(), total.contiguous()
        if out is None or lse is None:
            out = torch.empty_like(a.q, memory_format=torch.contiguous_format)
            lse = total.new_empty(heads, rows)
        first = 0
        for start, stop in at:
            last = first + stop - start
            out[start:stop, span] = o[first:last]
            lse[span, start:stop] = total[:, first:last]
            first = last
    if out is None or lse is None:
        return attend(a.q, a.q[:0], a.q[:0], a.scale)
    return out, lse


def backward(
    a: Arguments, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wanted: Wanted
) -> Gradients:
    """Gradients from those of out (T, H, C) and lse (H, T)."""
    layout = HostLayout.of(a)
    dq = torch.zeros_like(a.q, memory_format=torch.contiguous_format)
    dense = [(_like(k, wanted.dense), _like(v, wanted.dense)) for k, v, _ in a.segments]
    packed = _packed(a) if wanted.bank else None
    for item, head in _problems(a):
        at, span = layout.query_rows(item), _heads(a, head)
        k, v = _gather(a, layout, item, head)
        dlse = None if grad_lse is None else torch.cat([grad_lse[span, x:y] for x, y in at] or [lse[span, :0]], dim=1)
        total = torch.cat([lse[span, x:y] for x, y in at] or [lse[span, :0]], dim=1)
        operands = (_take(x, at)[:, span] for x in (grad_out, a.q, out))
        do, q, o = operands
        dq_item, dk, dv = attend_backward(do, dlse, q, k, v, o, total, a.scale)
        _put(dq, at, span, dq_item)
        key_span = slice(None) if head is None else slice(head, head + 1)
        first = 0
        for n, (dk_all, dv_all) in enumerate(dense):
            ranges = layout.key_rows(n, item)
            count = sum(y - x for x, y in ranges)
            if dk_all is not None and dv_all is not None:
                _put(dk_all, ranges, key_span, dk[first : first + count])
                _put(dv_all, ranges, key_span, dv[first : first + count])
            first += count
        if packed is not None:
            start, stop = layout.kept(item, head or 0)
            packed[0][start:stop] = dk[first:]
            packed[1][start:stop] = dv[first:]
    bank = (None, None) if packed is None else _into_bank(a, layout, packed)
    (dk1, dv1), (dk2, dv2) = [*dense, (None, None), (None, None)][:2]
    return Gradients(dq if wanted.q else None, dk1, dv1, dk2, dv2, *bank)


def _problems(a: Arguments) -> Iterator[tuple[int, int | None]]:
    """(item, key/value head or None for all of them): one dense attention each."""
    for item in range(a.items):
        if a.per_head:
            yield from ((item, head) for head in range(a.key_heads))
        else:
            yield item, None


def _heads(a: Arguments, head: int | None) -> slice:
    """The query heads of a key/value head."""
    group = a.q.shape[1] // a.key_heads
    return slice(None) if head is None else slice(head * group, (head + 1) * group)


def _take(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """Rows of `x` in order; a view where they lie together."""
    if len(ranges) == 1:
        return x[ranges[0][0] : ranges[0][1]]
    return torch.cat([x[a:b] for a, b in ranges]) if ranges else x[:0]


def _put(x: Tensor, ranges: list[tuple[int, int]], span: slice, rows: Tensor) -> None:
    first = 0
    for start, stop in ranges:
        x[start:stop, span] = rows[first : first + stop - start]
        first += stop - start


def _gather(a: Arguments, layout: HostLayout, item: int, head: int | None) -> tuple[Tensor, Tensor]:
    """Keys and values (K, G or 1, C) of one problem."""
    span = slice(None) if head is None else slice(head, head + 1)
    start, stop = layout.kept(item, head or 0)
    ranges = [layout.key_rows(n, item) for n in range(len(a.segments))]
    count = sum(y - x for r in ranges for x, y in r)
    if stop == start and sum(map(len, ranges)) == 1:  # dense rows of one tensor: a view
        n = next(n for n, r in enumerate(ranges) if r)
        k, v, _ = a.segments[n]
        return _take(k, ranges[n])[:, span], _take(v, ranges[n])[:, span]
    heads = a.key_heads if head is None else 1
    both = []
    for which in (0, 1):
        rows = a.q.new_empty(count + stop - start, heads, a.q.shape[2])
        at = 0
        for n, segment in enumerate(a.segments):
            for x, y in ranges[n]:
                rows[at : at + y - x] = segment[which][x:y, span]
                at += y - x
        bank = (a.k_ref, a.v_ref)[which]
        if stop > start and bank is not None and a.ref_indices is not None:
            torch.index_select(bank[:, span], 0, a.ref_indices[start:stop], out=rows[at:])
        both.append(rows)
    return both[0], both[1]


def _like(x: Tensor, wanted: bool) -> Tensor | None:
    return torch.zeros_like(x, memory_format=torch.contiguous_format) if wanted else None


def _packed(a: Arguments) -> tuple[Tensor, Tensor] | None:
    """Room for the gradients of gathered rows, (nnz, G, C); (nnz, 1, C) where every entry belongs to one head."""
    if a.k_ref is None or a.ref_indices is None:
        return None
    shape = (a.ref_indices.shape[0], 1 if a.per_head else a.key_heads, a.q.shape[2])
    return a.q.new_empty(shape), a.q.new_empty(shape)


def _into_bank(a: Arguments, layout: HostLayout, packed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    assert a.k_ref is not None
    assert a.ref_indices is not None
    size, heads, channels = a.k_ref.shape
    rows = a.ref_indices.long()
    if a.per_head:  # one bucket for each (head, row)
        counts = torch.tensor([row[-1] - row[0] for row in layout.offsets], device=rows.device)
        head = torch.repeat_interleave(torch.arange(heads, device=rows.device), counts, output_size=rows.shape[0])
        rows = rows + head * size
    out = []
    for x in packed:
        total = sum_rows(x.flatten(1), rows, size * (heads if a.per_head else 1), a.distinct).to(a.q.dtype)
        if a.per_head:
            total = total.view(heads, size, channels).transpose(0, 1).contiguous()
        out.append(total.view(size, heads, channels))
    return out[0], out[1]
