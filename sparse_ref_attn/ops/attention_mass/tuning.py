"""Tile sizes of the Triton kernels, by compute capability and head dim.

Chosen from registers and shared memory as compiled ahead of time (no spills, room for two or more programs on a
multiprocessor), not from timings: no card has run them yet. `tests/ops/test_mass_rows_compiled.py` holds the limits.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LSE_TILES", "MASS_TILES", "Tiles", "tiles_for"]


class Tiles(NamedTuple):
    """Queries and keys of one tile, warps of one program, stages of the software pipeline."""

    block_q: int
    block_k: int
    warps: int
    stages: int


# (capability at least, head dim) -> tiles. For the mass a program owns block_k reference rows.
MASS_TILES = {
    (80, 32): Tiles(64, 64, 4, 3),
    (80, 64): Tiles(64, 64, 4, 3),
    (80, 128): Tiles(64, 64, 4, 3),
    (90, 32): Tiles(128, 64, 4, 3),
    (90, 64): Tiles(128, 64, 4, 3),
    (90, 128): Tiles(128, 64, 4, 2),
}
# For the LSE a program owns block_q queries.
LSE_TILES = {
    (80, 32): Tiles(128, 64, 4, 3),
    (80, 64): Tiles(128, 64, 4, 3),
    (80, 128): Tiles(128, 64, 8, 2),
    (90, 32): Tiles(128, 128, 8, 2),
    (90, 64): Tiles(128, 128, 8, 2),
    (90, 128): Tiles(128, 128, 8, 2),
}


def tiles_for(table: dict[tuple[int, int], Tiles], capability: int, channels: int) -> Tiles:
    """The row of the newest capability that is not newer than the card's; 80 for everything older or not NVIDIA's."""
    known = sorted({c for c, _ in table})
    return table[max([c for c in known if c <= capability] or known[:1]), channels]
