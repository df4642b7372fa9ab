"""Which rows a program of a ragged launch works on. Shared by the Triton kernels.

A launch over P x B row ranges of T rows in all starts ``tiles_at_most(T, P * B, BLOCK)`` programs, known without
reading the ranges; each finds its own range from the offsets, and the few left over return.
"""

import triton
import triton.language as tl

__all__ = ["find_tile", "tiles_at_most"]


@triton.jit
def find_tile(CU, tile, items, PARTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """The `tile`-th block of rows of the ranges CU (PARTS, items + 1); SLOTS is a power of two >= PARTS * items.

    Returns item, first row and the end of the range; first row 0 and end 0 where there is no such block.
    """
    slot = tl.arange(0, SLOTS)
    part = slot // items
    item = slot % items
    at = CU + part * (items + 1) + item
    start = tl.load(at, mask=part < PARTS, other=0).to(tl.int32)
    stop = tl.load(at + 1, mask=part < PARTS, other=0).to(tl.int32)
    blocks = (stop - start + BLOCK - 1) // BLOCK
    ends = tl.cumsum(blocks, 0)
    before = ends - blocks
    here = (tile >= before) & (tile < ends)
    first = start + (tile - before) * BLOCK
    return (
        tl.sum(tl.where(here, item, 0), 0),
        tl.sum(tl.where(here, first, 0), 0),
        tl.sum(tl.where(here, stop, 0), 0),
    )


def tiles_at_most(rows: int, ranges: int, block: int) -> int:
    """Blocks that `rows` rows in `ranges` ranges can need: every range may end in a block of its own."""
    return triton.cdiv(rows, block) + ranges if rows else 0
