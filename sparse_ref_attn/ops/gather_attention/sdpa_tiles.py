r"""Selections of query tiles: what an item's tiles share is one dense attention, what a tile has of its own another.

    lse = ln(e^{lse_1} + e^{lse_2})        out = out_1 + (out_2 - out_1) e^{lse_2 - lse}

The second one is written out here, for tiles of equal numbers at once and head by head, so that the head's bank and the
rows that are copied from it stay in the cache: fused kernels lose half their speed on 16 queries.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Arguments, HostLayout

__all__ = ["forward_of_tiles"]

SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}  # that are held at once
COPIED = 1 << 27  # elements of keys copied at once on a card; on a CPU the keys of one tile for each thread


class _Group(NamedTuple):
    """Tiles alike: `queries` rows of q from `first` of each on, `kept` rows of the bank, `means` rows of k2.

    ``tiles`` are their numbers, ``selected`` and ``dense`` where their rows start in ref_indices and in k2.
    """

    queries: int
    kept: int
    means: int
    dense: int
    tiles: list[int]
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
    group, dtype = a.q.shape[1] // a.key_heads, lse.dtype
    groups = [] if a.per_head else _groups(a, layout, 0)
    for head in range(a.key_heads):
        heads = slice(head * group, (head + 1) * group)
        operands = (a.k_ref, a.v_ref, *((None, None) if a.bias is None else (a.k2, a.v2)))
        of_head = [None if x is None else x[:, head].to(dtype).contiguous() for x in operands]
        for tiles in _groups(a, layout, head) if a.per_head else groups:
            rows = _rows(tiles.first, tiles.queries, a.q.device)
            q = a.q[rows, heads].to(dtype) * a.scale
            o, total = _attend(a, tiles, q.reshape(len(tiles.tiles), -1, q.shape[2]), *of_head)
            _merge(out[:, heads], lse[heads], rows, o.view(q.shape), total.view(q.shape[:2]).t())
    return out, lse


def _groups(a: Arguments, layout: HostLayout, head: int) -> list[_Group]:
    """Tiles with queries and keys, by item and numbers of rows."""
    found: dict[tuple[int, int, int, int], _Group] = {}
    for tile, (item, (first, last)) in enumerate(zip(layout.tile_items, pairwise(layout.tiles), strict=True)):
        start, stop = layout.kept(tile, head)
        dense, end = (0, 0) if a.bias is None else layout.segments[1][0][item : item + 2]
        size = last - first, stop - start, end - dense, dense
        if size[0] and (size[1] or size[2]):
            group = found.setdefault(size, _Group(*size, [], [], []))
            for rows, row in zip(group[4:], (tile, first, start), strict=True):
                rows.append(row)
    return list(found.values())


def _attend(
    a: Arguments,
    tiles: _Group,
    q: Tensor,
    k_ref: Tensor | None,
    v_ref: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scaled q (tiles, n, C), keys and values of one head -> out (tiles, n, C) and lse (tiles, n, 1)."""
    count, n, _ = q.shape
    kept, keys = tiles.kept, tiles.kept + tiles.means
    copied, held = _steps(q, kept, keys)
    out, peak, total = torch.zeros_like(q), q.new_empty(count, n, 1), q.new_empty(count, n, 1)
    scores = q.new_empty(min(held, count), n, keys)
    # views of all steps at once: made one by one they take as long as the products
    of_copies = [x.split(copied) for x in (q, out)]
    rows, gather = _selected(a, tiles, copied), _Gather(q, kept, copied)
    scores_of_copies = scores[..., :kept].split(copied)
    means = slice(tiles.dense, tiles.dense + tiles.means)
    bias = None if a.bias is None else a.bias[_rows(tiles.tiles, 1, q.device), None, : tiles.means].to(q.dtype)
    for start in range(0, count, held):
        stop = min(start + held, count)
        s, o = scores[: stop - start], out[start:stop]
        steps = range(start // copied, -(-stop // copied)) if kept else range(0)
        if stop - start < held:
            scores_of_copies = s[..., :kept].split(copied)
        for step, into in zip(steps, scores_of_copies, strict=False):
            torch.bmm(of_copies[0][step], gather(k_ref, rows[step]).transpose(1, 2), out=into)
        if k2 is not None and bias is not None:
            torch.matmul(q[start:stop], k2[means].t(), out=s[..., kept:]).add_(bias[start:stop])
        largest = torch.amax(s, 2, keepdim=True, out=peak[start:stop])
        s.sub_(largest.clamp(min=torch.finfo(s.dtype).min)).exp_()
        torch.sum(s, 2, keepdim=True, out=total[start:stop])
        for step, weights in zip(steps, scores_of_copies, strict=False):
            torch.bmm(weights, gather(v_ref, rows[step]), out=of_copies[1][step])
        if v2 is not None:
            o.add_(torch.matmul(s[..., kept:], v2[means]))
    return out.div_(total.clamp(min=torch.finfo(q.dtype).tiny)), peak.add_(total.log_())


class _Gather:
    """Copies the rows of a bank (R, C) that some tiles keep, always to the same place: (tiles, kept, C)."""

    def __init__(self, q: Tensor, kept: int, tiles: int) -> None:
        self.room = q.new_empty(tiles * kept, q.shape[2])
        self.view = self.room.unflatten(0, (tiles, kept))

    def __call__(self, bank: Tensor | None, rows: Tensor) -> Tensor:
        assert bank is not None
        if rows.shape[0] == self.room.shape[0]:
            torch.index_select(bank, 0, rows, out=self.room)
            return self.view
        return bank.index_select(0, rows).unflatten(0, (-1, self.view.shape[1]))


def _steps(q: Tensor, kept: int, keys: int) -> tuple[int, int]:
    """Tiles whose keys are copied at once, and a multiple of it: tiles whose scores are held at once."""
    count, n, channels = q.shape
    held = SCORES.get(q.device.type, SCORES["cpu"]) // (n * keys)
    copied = COPIED // max(kept * channels, 1) if q.device.type == "cuda" else torch.get_num_threads()
    copied = min(max(1, copied), count)
    return copied, max(1, held // copied) * copied


def _selected(a: Arguments, tiles: _Group, copied: int) -> tuple[Tensor, ...]:
    """The bank's rows that so many tiles at a time keep."""
    if a.ref_indices is None or not tiles.kept:
        return ()
    return a.ref_indices[_rows(tiles.selected, tiles.kept, a.q.device)].split(copied * tiles.kept)


def _merge(out: Tensor, lse: Tensor, rows: slice | Tensor, o: Tensor, total: Tensor) -> None:
    """Results o (n, h, C) and total (h, n) of other keys join those rows of out (T, h, C) and lse (h, T)."""
    both = torch.logaddexp(lse[:, rows], total)
    share = torch.where(both.isneginf(), 0.0, (total - both).exp()).t()[..., None]
    out[rows] = torch.lerp(out[rows].to(o.dtype), o, share).to(out.dtype)
    lse[:, rows] = both


def _rows(starts: list[int], length: int, device: torch.device) -> slice | Tensor:
    """`length` rows from each start on: a slice where they follow one another."""
    if all(y - x == length for x, y in pairwise(starts)):
        return slice(starts[0], starts[0] + len(starts) * length)
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(device)
