"""What one branch of guidance has stored where each tile of generation tokens reads by its own ranking."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ...errors import IncompatibleError, LayoutError
from ...execution import Cache
from ...record import TileRecord
from ...reference_cache import Cells, TiledCache, TileRanking, Tiling
from ...run import Run
from ...types import TokenLayout

__all__ = ["HeldTiles", "cells_of", "reference_grids"]


def reference_grids(layout: TokenLayout) -> tuple[tuple[int, int], ...]:
    """Height and width of each reference in tokens.

    Raises
    ------
    IncompatibleError
        If one has no grid.
    """
    grids = tuple(reference.grid for reference in layout.references)
    if None in grids:
        raise IncompatibleError(
            f'rest="means" needs the height and width in tokens of each reference, got {grids}: use rest=None, or '
            'per="run"'
        )
    return grids  # type: ignore[return-value]


def cells_of(way: Cache, layout: TokenLayout) -> Cells | None:
    """The cells whose means stand for what tiles do not read; None where nothing does."""
    return None if way.rest is None else Cells(reference_grids(layout), way.cell)


class HeldTiles:
    """Rows in the order of the tokens, what each tile reads of them, and the call's own rows in tile order.

    Parameters
    ----------
    run : Run
    layers : int
        Attention layers.
    grid : (int, int)
        Of the generation.
    layout : TokenLayout
        Of the branch's calls.
    batch : int
    device : torch.device
    """

    tokens: Tensor | None = None
    idle: frozenset[int] = frozenset()

    def __init__(
        self, run: Run, layers: int, grid: tuple[int, int], layout: TokenLayout, batch: int, device: torch.device
    ) -> None:
        way, budgeting = run.config.execute, run.budgeting
        assert isinstance(way, Cache)
        self._run = weakref.ref(run)
        self.way, self.layers, self.layout, self.batch = way, layers, layout, batch
        self.tiling, self.cells = Tiling(layout.text, grid, way.tile), cells_of(way, layout)
        self.ranking = TileRanking(
            self.tiling, layout.sizes, self.cells, budgeting.shared, budgeting.least, run.config.weights
        )
        self.cache = TiledCache(layers, self.ranking)
        self.moved: dict[int, Tensor] = {}
        order = self.tiling.order
        self.order, self.places = order.to(device), order.argsort().to(device)
        self.generation = self.order[layout.text :] - layout.text
        self.generation_tiles_known = tuple(Tiling(0, grid, way.tile).offsets(1))
        self.tiles_known = tuple(self.tiling.offsets(batch))
        self.tiles = torch.tensor(self.tiles_known, dtype=torch.int32, device=device)
        self.generation_tiles = torch.tensor(self.generation_tiles_known, dtype=torch.int32, device=device)

    @property
    def complete(self) -> bool:
        """Whether the rows of every layer that attends were taken."""
        return all(self.cache.holds(i) for i in range(self.layers) if i not in self.idle)

    @property
    def nbytes(self) -> int:
        """Bytes of rows, means and rankings."""
        return self.cache.nbytes

    @property
    def bytes_of_all(self) -> int:
        """Bytes of the rows, which are those of every reference token."""
        return self.cache.row_bytes

    def are_of(self, run: Run) -> bool:
        """Whether they are a run's."""
        return self._run() is run

    def take(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values (B, R, H, C) of the references."""
        change = self.cache.store(layer, k, v)
        if change is not None:
            self.moved[layer] = change

    def check(self, seen: Tensor | None) -> None:
        """Raise LayoutError where a cached call's mask shows other reference tokens than that of the full one (syncs
        where there is a mask)."""
        held = self.cache.seen
        if (held is None) != (seen is None) or (held is not None and seen is not None and not torch.equal(held, seen)):
            raise LayoutError(
                "where each tile reads reference tokens of its own, the attention mask must hide the same of them as "
                'in the step that stored their keys and values, got one that hides others: use per="run"'
            )

    def record(self) -> TileRecord:
        """Where a call's tiles are, to be filled with what they read."""
        way = self.way
        return TileRecord(self.tiling.grid, way.tile, 0 if way.rest is None else way.cell, bool(self.layout.text))
