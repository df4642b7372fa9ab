"""Query tiles in chunks: which rows are summed together, tiles of one size in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Run", "chunks_of", "mean_of", "sum_tiles", "weigh_tiles"]


class Run(NamedTuple):
    """`number` tiles from `tile` on, of `size` rows each, or `size` rows of one tile; `first` counts in the chunk."""

    first: int
    tile: int
    number: int
    size: int


def chunks_of(tiles: Sequence[int], most: int) -> Iterator[tuple[slice, list[Run]]]:
    """The rows of each chunk, at most `most`, and its runs. A tile is cut only where it is longer than a chunk.

    Examples
    --------
    >>> for rows, runs in chunks_of([0, 2, 4, 4, 9], 4):
    ...     print(rows.start, rows.stop, *map(tuple, runs))
    0 4 (0, 0, 2, 2)
    4 8 (0, 3, 1, 4)
    8 9 (0, 3, 1, 1)
    """
    begin, runs = 0, list[Run]()
    for tile, (start, stop) in enumerate(pairwise(tiles)):
        if runs and stop - begin > most:
            yield slice(begin, start), runs
            begin, runs = start, []
        while stop - start > most:
            yield slice(start, start + most), [Run(0, tile, 1, most)]
            begin = start = start + most
        if start == stop:
            continue
        last = runs[-1] if runs else None
        if last is not None and last.size == stop - start and last.tile + last.number == tile:
            runs[-1] = last._replace(number=last.number + 1)
        else:
            runs.append(Run(start - begin, tile, 1, stop - start))
    if runs:
        yield slice(begin, tiles[-1]), runs


def mean_of(total: Tensor, tiles: Sequence[int], heads: int) -> Tensor:
    """Sums (B, H or 1, T, R) over each tile's queries, and over `heads` of them, become means in place."""
    for _, runs in chunks_of(tiles, max(tiles[-1], 1)):
        for _, tile, number, size in runs:
            total[:, :, tile : tile + number] /= size * heads
    return total


def sum_tiles(scores: Tensor, runs: Sequence[Run], out: Tensor) -> None:
    """Add each tile's rows of `scores` (H, rows, R) to `out` (H, T, R), or those of all heads to one of (1, T, R)."""
    for first, tile, number, size in runs:
        rows = scores[:, first : first + number * size].unflatten(1, (number, size))
        out[:, tile : tile + number] += rows.sum(2) if rows.shape[0] == out.shape[0] else rows.sum((0, 2))


def weigh_tiles(weights: Tensor, scores: Tensor, runs: Sequence[Run], out: Tensor) -> None:
    """The same of rows that `weights` (H, rows) multiply."""
    for first, tile, number, size in runs:
        some = slice(first, first + number * size)
        rows, factors = (x[:, some].unflatten(1, (number, size)) for x in (scores, weights))
        part = torch.einsum("hts,htsr->htr", factors, rows)
        out[:, tile : tile + number] += part if rows.shape[0] == out.shape[0] else part.sum(0)
