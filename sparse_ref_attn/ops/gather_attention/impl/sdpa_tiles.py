r"""Selections of query tiles: attention to what tiles share, to the biased keys, and to what a tile keeps, joined.

    lse = ln(e^{lse_1} + e^{lse_2})        out = out_1 + (out_2 - out_1) e^{lse_2 - lse}

The first two are dense. The last one is written out here, for tiles of equal numbers at once and head by head, so that
the head's bank and the rows that are copied from it stay in the cache: fused kernels lose half their speed there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import Arguments, HostLayout
from .dense_attention import attend_biased

__all__ = ["forward_of_tiles"]

# Held at once, on a CPU for each thread: many small steps of several threads wait for one another.
SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}
COPIED = {"cpu": 1 << 20, "cuda": 1 << 27}  # elements of keys


class _Group(NamedTuple):
    """Tiles alike: `queries` rows of q from `first` of each on, `kept` rows named in ref_indices from `selected` on."""

    queries: int
    kept: int
    first: list[int]
    selected: list[int]


def forward_of_tiles(
    a: Arguments, layout: HostLayout, dense: Callable[[Arguments, HostLayout], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T); `dense` computes the call without tiles."""
    shared = a.shared
    if shared is None:
        out = torch.zeros_like(a.q, memory_format=torch.contiguous_format)
        lse = a.q.new_full(a.q.shape[1::-1], float("-inf"), dtype=torch.promote_types(a.q.dtype, torch.float32))
    else:
        out, lse = dense(shared, HostLayout(layout.queries, layout.segments[: len(shared.segments)], [], []))
    if a.bias is not None:
        _join_biased(a, layout, out, lse)
    if a.k_ref is None or a.v_ref is None or a.ref_indices is None:
        return out, lse
    group, dtype = a.q.shape[1] // a.key_heads, lse.dtype
    groups = [] if a.per_head else _groups(layout, 0)
    for head in range(a.key_heads):
        heads = slice(head * group, (head + 1) * group)
        keys, values = (x[:, head].to(dtype).contiguous() for x in (a.k_ref, a.v_ref))
        for tiles in _groups(layout, head) if a.per_head else groups:
            rows = _rows(tiles.first, tiles.queries, a.q.device)
            q = a.q[rows, heads].to(dtype) * a.scale
            chosen = a.ref_indices[_rows(tiles.selected, tiles.kept, a.q.device)]
            o, total = _attend(q.reshape(len(tiles.first), -1, q.shape[2]), keys, values, chosen, tiles.kept)
            _merge(out[:, heads], lse[heads], rows, o.view(q.shape), total.view(q.shape[:2]).t())
    return out, lse


def _join_biased(a: Arguments, layout: HostLayout, out: Tensor, lse: Tensor) -> None:
    """Each item's rows of k2, under the biases of its tiles."""
    assert a.k2 is not None
    assert a.v2 is not None
    assert a.cu_tiles is not None
    assert a.bias is not None
    tiles = torch.arange(a.tiles, device=a.q.device)
    tile_of = torch.repeat_interleave(tiles, a.cu_tiles.diff(), output_size=a.q.shape[0])
    for item, (start, stop) in enumerate(pairwise(layout.segments[1][0])):
        for first, last in layout.query_rows(item) if start < stop else ():
            rows = slice(first, last)
            q, k, v, biases = a.q[rows], a.k2[start:stop], a.v2[start:stop], a.bias[:, : stop - start]
            _merge(out, lse, rows, *attend_biased(q, k, v, biases, tile_of[rows], a.scale))


def _groups(layout: HostLayout, head: int) -> list[_Group]:
    """Tiles with queries and kept rows, by the numbers of both."""
    found: dict[tuple[int, int], _Group] = {}
    for tile, (first, last) in enumerate(pairwise(layout.tiles)):
        start, stop = layout.kept(tile, head)
        size = last - first, stop - start
        if size[0] and size[1]:
            group = found.setdefault(size, _Group(*size, [], []))
            group.first.append(first)
            group.selected.append(start)
    return list(found.values())


def _attend(q: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Scaled q (tiles, n, C) to the rows `chosen` (tiles * kept,) of one head's bank (R, C).

    Returns out (tiles, n, C) and lse (tiles, n, 1).
    """
    count, n, _ = q.shape
    copied, held = _steps(q, kept)
    out, peak, total = torch.empty_like(q), q.new_empty(count, n, 1), q.new_empty(count, n, 1)
    scores, gather = q.new_empty(min(held, count), n, kept), _Gather(q, kept, copied)
    # views of all steps at once: made one by one they take as long as the products
    steps = list(zip(q.split(copied), chosen.split(copied * kept), out.split(copied), strict=True))
    parts = scores.split(copied)
    for start in range(0, count, held):
        stop = min(start + held, count)
        s = scores[: stop - start]
        if stop - start < held:
            parts = s.split(copied)
        now = steps[start // copied : -(-stop // copied)]
        for (of_q, rows, _), into in zip(now, parts, strict=True):
            torch.bmm(of_q, gather(keys, rows).transpose(1, 2), out=into)
        s.sub_(torch.amax(s, 2, keepdim=True, out=peak[start:stop])).exp_()
        torch.sum(s, 2, keepdim=True, out=total[start:stop])
        for (_, rows, into), weights in zip(now, parts, strict=True):
            torch.bmm(weights, gather(values, rows), out=into)
    return out.div_(total), peak.add_(total.log_())


class _Gather:
    """Copies the rows of a bank (R, C) that some tiles keep, always to the same place: (tiles, kept, C)."""

    def __init__(self, q: Tensor, kept: int, tiles: int) -> None:
        self.room = q.new_empty(tiles * kept, q.shape[2])
        self.view = self.room.unflatten(0, (tiles, kept))

    def __call__(self, bank: Tensor, rows: Tensor) -> Tensor:
        if rows.shape[0] == self.room.shape[0]:
            torch.index_select(bank, 0, rows, out=self.room)
            return self.view
        return bank.index_select(0, rows).unflatten(0, (-1, self.view.shape[1]))


def _steps(q: Tensor, kept: int) -> tuple[int, int]:
    """Tiles whose keys are copied at once, and a multiple of it: tiles whose scores are held at once."""
    count, n, channels = q.shape
    where, threads = ("cuda", 1) if q.device.type == "cuda" else ("cpu", torch.get_num_threads())
    copied = min(threads * max(1, COPIED[where] // (kept * channels)), count)
    return copied, max(1, threads * SCORES[where] // (n * kept) // copied) * copied


def _merge(out: Tensor, lse: Tensor, rows: slice | Tensor, o: Tensor, total: Tensor) -> None:
    """Results o (n, h, C) and total (h, n) of other keys join those rows of out (T, h, C) and lse (h, T)."""
    both = torch.logaddexp(lse[:, rows], total)
    share = torch.where(both.isneginf(), 0.0, (total - both).exp()).t()[..., None]
    if isinstance(rows, slice) and out.dtype == share.dtype:
        out[rows].lerp_(o, share)
    else:
        out[rows] = torch.lerp(out[rows].to(share.dtype), o.to(share.dtype), share).to(out.dtype)
    lse[:, rows] = both


def _rows(starts: list[int], length: int, device: torch.device) -> slice | Tensor:
    """`length` rows from each start on: a slice where they follow one another."""
    if all(y - x == length for x, y in pairwise(starts)):
        return slice(starts[0], starts[0] + len(starts) * length)
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(device)
