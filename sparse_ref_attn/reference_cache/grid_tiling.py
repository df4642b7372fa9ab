"""Squares of neighbouring tokens on a grid: tiles of queries that read alike, and cells of keys that have one mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Cells", "Tiling", "squares"]

Grid = tuple[int, int]
LEAST = 1e-20  # of a weight: attention that vanished


def squares(grid: Grid, side: int) -> Tensor:
    """The square of each token of a grid, (tokens,) int64, both in reading order; those at the edges are smaller.

    Examples
    --------
    >>> squares((2, 3), 2)
    tensor([0, 0, 1, 0, 0, 1])
    """
    height, width = grid
    across = -(-width // side)
    return (torch.arange(height)[:, None] // side * across + torch.arange(width) // side).flatten()


@dataclass(frozen=True)
class Tiling:
    """A call's own rows, text first, by tiles: the text is one, the generation's follow in reading order.

    Parameters
    ----------
    text : int
        Text rows; 0 for no such tile.
    grid : (int, int)
        Height and width of the generation in tokens.
    side : int
        Of a tile.

    Examples
    --------
    >>> tiling = Tiling(1, (2, 3), 2)
    >>> tiling.order, tiling.sizes, tiling.offsets(2)
    (tensor([0, 1, 2, 4, 5, 3, 6]), (1, 4, 2), [0, 1, 5, 7, 8, 12, 14])
    """

    text: int
    grid: Grid
    side: int

    @cached_property
    def _tiles(self) -> Tensor:
        return squares(self.grid, self.side)

    @cached_property
    def order(self) -> Tensor:
        """Which row stands at each place in tile order, (rows,) int64, on the CPU."""
        generation = self._tiles.argsort(stable=True) + self.text
        return torch.cat([torch.arange(self.text), generation])

    @cached_property
    def generation_sizes(self) -> tuple[int, ...]:
        """Rows of each of the generation's tiles."""
        return tuple(self._tiles.bincount().tolist())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each tile."""
        return (*((self.text,) if self.text else ()), *self.generation_sizes)

    @property
    def rows(self) -> int:
        """Rows of all tiles."""
        return self.text + self.grid[0] * self.grid[1]

    @property
    def shape(self) -> Grid:
        """Rows and columns of the generation's tiles."""
        return -(-self.grid[0] // self.side), -(-self.grid[1] // self.side)

    def offsets(self, items: int) -> list[int]:
        """Where each tile begins in the rows of `items` items, one item after another, and where the last ends."""
        return list(accumulate(self.sizes * items, initial=0))


@dataclass(frozen=True)
class Cells:
    """The cells of some references' grids.

    Parameters
    ----------
    grids : tuple of (int, int)
        Height and width of each reference in tokens.
    side : int
        Of a cell.

    Examples
    --------
    >>> cells = Cells(((1, 3), (1, 1)), 2)
    >>> cells.count, cells.of_tokens
    (3, tensor([0, 0, 1, 2]))
    >>> cells.means(torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 4, 1, 1)).flatten()
    tensor([2., 5., 7.])
    """

    grids: tuple[Grid, ...]
    side: int

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Cells of each reference."""
        return tuple(-(-height // self.side) * -(-width // self.side) for height, width in self.grids)

    @property
    def count(self) -> int:
        """Cells of all references."""
        return sum(self.counts)

    @cached_property
    def of_tokens(self) -> Tensor:
        """The cell of each reference token, (R,) int64, on the CPU."""
        starts = accumulate(self.counts, initial=0)
        return torch.cat([squares(grid, self.side) + at for grid, at in zip(self.grids, starts, strict=False)])

    def means(self, rows: Tensor, seen: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """The mean of each cell's rows: (B, R, H, C) to (B, cells, H, C).

        Parameters
        ----------
        rows : Tensor
        seen : Tensor, shape (B, R), bool, optional
            Tokens that count; a cell without any is zero. Default all.
        weights : Tensor, shape (B, R), float32, optional
            By which they count, >= 0; where a cell has none, alike. The sums are in float32. Default alike.
        """
        if weights is not None:
            weights = weights.clamp_min(LEAST) if seen is None else weights.clamp_min(LEAST) * seen
            weights = weights[..., None, None]
            shares = self._pooled(weights).clamp_min(torch.finfo(weights.dtype).tiny)
            return (self._pooled(torch.where(weights > 0, rows * weights, 0.0)) / shares).to(rows.dtype)
        if seen is not None:
            weights = seen.to(rows.dtype)[..., None, None]
            shares = self._pooled(weights)
            tiny = torch.finfo(rows.dtype).tiny
            return self._pooled(rows.masked_fill(weights == 0, 0.0)) / shares.clamp_min(tiny)
        return self._pooled(rows)

    def _pooled(self, rows: Tensor) -> Tensor:
        batch, _, *rest = rows.shape
        parts: Sequence[Tensor] = rows.split([height * width for height, width in self.grids], 1)
        pooled = []
        for part, (height, width) in zip(parts, self.grids, strict=True):
            image = part.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
            mean = functional.avg_pool2d(image, self.side, ceil_mode=True, count_include_pad=False)
            pooled.append(mean.permute(0, 2, 3, 1).reshape(batch, -1, *rest))
        return torch.cat(pooled, 1)
