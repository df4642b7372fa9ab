"""Which block of rows a program of a ragged launch works on.

A launch over P x B row ranges of T rows in all starts ``blocks_at_most(T, P * B, BLOCK)`` programs, known without
reading the ranges; each finds its own range from the offsets, and the few left over return.
"""

import triton
import triton.language as tl

__all__ = ["blocks_at_most", "find_block"]


@triton.jit
def find_block(CU, number, items, PARTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """The `number`-th block of rows of the ranges CU (PARTS, items + 1); SLOTS is a power of two >= PARTS * items.

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
    here = (number >= before) & (number < ends)
    first = start + (number - before) * BLOCK
    return (
        tl.sum(tl.where(here, item, 0), 0),
        tl.sum(tl.where(here, first, 0), 0),
        tl.sum(tl.where(here, stop, 0), 0),
    )


def blocks_at_most(rows: int, ranges: int, block: int) -> int:
    """Blocks that `rows` rows in `ranges` ranges can need: every range may end in a block of its own."""
    return triton.cdiv(rows, block) + ranges if rows else 0
