r"""Selections of query tiles: what an item's tiles share is one dense attention, what a tile has of its own another.

    lse = ln(e^{lse_1} + e^{lse_2})        out = out_1 + (out_2 - out_1) e^{lse_2 - lse}

The second one runs for many tiles of equal size at once, over a copy of their keys that fits a cache. On a CPU it runs
head by head, so that the bank's rows of one head stay in the cache too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._dense import attend_batch
from .arguments import Arguments, HostLayout

__all__ = ["forward_of_tiles"]

COPIED = {"cpu": 1 << 18, "cuda": 1 << 27}  # elements of keys that are copied at once


class _Group(NamedTuple):
    """Tiles alike: `queries` rows of q from `first` of each on, `kept` rows of the bank, `means` rows of k2.

    ``tiles`` are their numbers, ``selected`` and ``dense`` where their rows start in ref_indices and in k2.
    """

    queries: int
    kept: int
    means: int
    tiles: list[int]
    first: list[int]
    selected: list[int]
    dense: list[int]

    def part(self, start: int, stop: int) -> _Group:
        """Some of the tiles."""
        return self._replace(**{name: getattr(self, name)[start:stop] for name in self._fields[3:]})


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
    group = a.q.shape[1] // a.key_heads
    one_by_one = a.per_head or a.q.device.type == "cpu"
    for head in range(a.key_heads) if one_by_one else (None,):
        span = slice(None) if head is None else slice(head, head + 1)
        heads = slice(None) if head is None else slice(head * group, (head + 1) * group)
        keys, values = _bank(a, span)
        for tiles in _groups(a, layout, head or 0):
            _join(a, tiles, keys, values, out[:, heads], lse[heads], a.q[:, heads])
    return out, lse


def _bank(a: Arguments, span: slice) -> tuple[Tensor, Tensor]:
    """Keys and values of some heads that tiles read: biased rows of k2, then the bank."""
    both = []
    for biased, ref in ((a.k2, a.k_ref), (a.v2, a.v_ref)):
        parts = [x[:, span] for x in (biased if a.bias is not None else None, ref) if x is not None]
        both.append(torch.cat(parts))
    return both[0], both[1]


def _groups(a: Arguments, layout: HostLayout, head: int) -> list[_Group]:
    """Tiles with queries and keys, by their numbers of rows."""
    found: dict[tuple[int, int, int], _Group] = {}
    for tile, (item, (first, last)) in enumerate(zip(layout.tile_items, pairwise(layout.tiles), strict=True)):
        start, stop = layout.kept(tile, head)
        dense, end = (0, 0) if a.bias is None else layout.segments[1][0][item : item + 2]
        size = last - first, stop - start, end - dense
        if size[0] and (size[1] or size[2]):
            group = found.setdefault(size, _Group(*size, [], [], [], []))
            for rows, row in zip(group[3:], (tile, first, start, dense), strict=True):
                rows.append(row)
    return list(found.values())


def _join(a: Arguments, tiles: _Group, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, q: Tensor) -> None:
    """What tiles have of their own joins out (T, h, C) and lse (h, T)."""
    for part, chosen in _parts(a, tiles, keys):
        rows = _rows(part.first, part.queries, q.device)
        count = len(part.tiles)
        k, v = (x.index_select(0, chosen.flatten()).unflatten(0, (count, -1)) for x in (keys, values))
        bias, dead = None, None
        if a.bias is not None:
            bias = torch.nn.functional.pad(_take(a.bias, part.tiles)[:, : part.means], (0, part.kept))
            dead = None if part.kept else bias.isneginf().all(1)
        o, total = attend_batch(q[rows].unflatten(0, (count, -1)), k, v, bias, a.scale)
        if dead is not None:  # no key at all, which kernels do not say
            total = total.masked_fill(dead[:, None, None], float("-inf"))
        _merge(out, lse, rows, o.flatten(0, 1), total.transpose(0, 1).flatten(1))


def _parts(a: Arguments, tiles: _Group, keys: Tensor) -> Iterator[tuple[_Group, Tensor]]:
    """Some tiles at a time, with the rows of `keys` (tiles, means + kept) that each of them reads."""
    device, before = a.q.device, 0 if a.bias is None or a.k2 is None else a.k2.shape[0]
    copied = (tiles.means + tiles.kept) * keys[0].numel()
    step = max(1, COPIED.get(device.type, COPIED["cpu"]) // copied)
    for start in range(0, len(tiles.tiles), step):
        part = tiles.part(start, start + step)
        count = len(part.tiles)
        chosen = []
        if part.means:
            dense = torch.tensor(part.dense)[:, None] + torch.arange(part.means)
            chosen.append(dense.to(device))
        if part.kept and a.ref_indices is not None:
            selected = a.ref_indices[_rows(part.selected, part.kept, device)]
            chosen.append(selected.view(count, -1) + before)
        yield part, torch.cat(chosen, dim=1)


def _merge(out: Tensor, lse: Tensor, rows: slice | Tensor, o: Tensor, total: Tensor) -> None:
    """Results o (n, h, C) and total (h, n) of other keys join those rows of out (T, h, C) and lse (h, T)."""
    both = torch.logaddexp(lse[:, rows], total)
    share = torch.where(both.isneginf(), 0.0, (total - both).exp()).t()[..., None]
    before = out[rows].to(share.dtype)
    out[rows] = torch.lerp(before, o.to(share.dtype), share).to(out.dtype)
    lse[:, rows] = both


def _rows(starts: list[int], length: int, device: torch.device) -> slice | Tensor:
    """`length` rows from each start on: a slice where they follow one another."""
    if all(y - x == length for x, y in pairwise(starts)):
        return slice(starts[0], starts[0] + len(starts) * length)
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(device)


def _take(x: Tensor, rows: list[int]) -> Tensor:
    """These rows of x, a view where they follow one another."""
    return x[_rows(rows, 1, x.device)]
