"""What tiles hold beside the stored rows, in a planned run."""

from __future__ import annotations

from ..config import SparseRef
from ..cost import ModelShape, reference_kv_bytes, tile_bytes
from ..execution import Cache
from ..reference_cache import Tiling
from ..types import TokenLayout
from .planned import PlannedRun

__all__ = ["held_by_tiles"]


def held_by_tiles(
    config: SparseRef, shape: ModelShape, run: PlannedRun, layout: TokenLayout, grid: tuple[int, int], batch: int
) -> int | None:
    """Bytes of the cells' means and of what each tile of the generation's `grid` reads; None without tiles."""
    if not isinstance(config.execute, Cache) or config.execute.per != "tile":
        return None
    if not run.ranked:
        return 0
    tiles = len(Tiling(layout.text, grid, config.execute.tile).sizes)
    means = reference_kv_bytes(shape, run.means, batch)
    return means + tile_bytes(shape, tiles, max(run.stored), run.means, batch)
