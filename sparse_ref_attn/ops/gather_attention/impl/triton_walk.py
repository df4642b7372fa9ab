"""The way over an item's keys, which the forward and the gradient of the queries share.

A kernel brings the step of one tile; here is where the tiles lie. The dense loop and the gathered loop are one
function; they differ only in how they find a row: the gathered one reads the *next* tile's indices while it works on
this one, so that the rows' addresses are known in time for the asynchronous copies.
"""

import triton
import triton.language as tl

from ...shared.operand import row_offsets, wide

__all__ = ["segment", "walk"]


@triton.jit
def _keys(
    STEP: tl.constexpr, query, state, K, V, INDICES, start, count, k_row, v_row, scale2, C: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys start .. count: those rows of K and V, or (GATHER) the rows named by those INDICES."""
    columns = tl.arange(0, BLOCK_N)
    if GATHER:
        following = tl.load(INDICES + start + columns, mask=start + columns < count, other=0)
    else:
        k_tile = row_offsets(columns, k_row, C)
        v_tile = row_offsets(columns, v_row, C)
    for first in tl.range(start, count, BLOCK_N, num_stages=STAGES):
        if GATHER:
            k_at = K + row_offsets(following, k_row, C)
            v_at = V + row_offsets(following, v_row, C)
            after = first + BLOCK_N + columns
            following = tl.load(INDICES + after, mask=after < count, other=0)
        else:
            k_at = K + tl.cast(first, tl.int64) * k_row + k_tile
            v_at = V + tl.cast(first, tl.int64) * v_row + v_tile
        state = STEP(query, state, k_at, v_at, first + columns < count, scale2, MASKED, PRECISION)
    return state


@triton.jit
def _rest(
    STEP: tl.constexpr, query, state, K, V, INDICES, start, count, k_row, v_row, scale2, C: tl.constexpr,
    BLOCK_N: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The last keys of a segment, fewer than a tile."""
    rows = start + tl.arange(0, BLOCK_N)
    inside = rows < count
    if GATHER:
        rows = tl.load(INDICES + rows, mask=inside, other=0)
    k_at = K + row_offsets(rows, k_row, C)
    v_at = V + row_offsets(rows, v_row, C)
    return STEP(query, state, k_at, v_at, inside, scale2, True, PRECISION)


@triton.jit
def segment(
    STEP: tl.constexpr, query, state, K, V, INDICES, count, k_row, v_row, scale2, C: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` keys; with SPLIT the whole tiles in a loop that needs no mask, then the rest."""
    whole = 0
    if SPLIT:
        whole = (count // BLOCK_N) * BLOCK_N
        state = _keys(
            STEP, query, state, K, V, INDICES, 0, whole, k_row, v_row, scale2,
            C, BLOCK_N, STAGES, GATHER, False, PRECISION,
        )  # fmt: skip
        # Not a second loop: of two that follow one another, ptxas serializes every matrix step on Hopper (C7515).
        if whole < count:
            state = _rest(
                STEP, query, state, K, V, INDICES, whole, count, k_row, v_row, scale2, C, BLOCK_N, GATHER, PRECISION
            )
        return state
    return _keys(
        STEP, query, state, K, V, INDICES, 0, count, k_row, v_row, scale2,
        C, BLOCK_N, STAGES, GATHER, True, PRECISION,
    )  # fmt: skip


@triton.jit
def walk(
    STEP: tl.constexpr, query, state, K, V, K2, V2, K_REF, V_REF, CU_K, INDICES, OFFSETS, item, items, key_head, scale2,
    C: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, DENSE: tl.constexpr,
    GATHER: tl.constexpr, PER_HEAD: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every tile of the item's keys and values joins `state`: the dense segments, then the gathered rows.

    ``STEP(query, state, k_at, v_at, inside, scale2, MASKED, PRECISION)`` takes pointers [N, C] and gives the state.
    WIDE: whether row strides are made int64 first (`wide`), which takes the forward fewer registers and dq more.
    """
    if DENSE > 0:
        at = tl.load(CU_K + item).to(tl.int64)
        count = (tl.load(CU_K + item + 1) - at).to(tl.int32)
        k_row, v_row = (wide(K.row), wide(V.row)) if WIDE else (K.row, V.row)
        k = K.data + key_head * K.head + at * k_row
        v = V.data + key_head * V.head + at * v_row
        state = segment(
            STEP, query, state, k, v, INDICES, count, k_row, v_row, scale2,
            C, BLOCK_N, STAGES, SPLIT, False, PRECISION,
        )  # fmt: skip
    if DENSE > 1:
        at = tl.load(CU_K + items + 1 + item).to(tl.int64)
        count = (tl.load(CU_K + items + 1 + item + 1) - at).to(tl.int32)
        k_row, v_row = (wide(K2.row), wide(V2.row)) if WIDE else (K2.row, V2.row)
        k = K2.data + key_head * K2.head + at * k_row
        v = V2.data + key_head * V2.head + at * v_row
        state = segment(
            STEP, query, state, k, v, INDICES, count, k_row, v_row, scale2,
            C, BLOCK_N, STAGES, SPLIT, False, PRECISION,
        )  # fmt: skip
    if GATHER:
        if PER_HEAD:
            OFFSETS += key_head * (items + 1)
        at = tl.load(OFFSETS + item).to(tl.int64)
        count = (tl.load(OFFSETS + item + 1) - at).to(tl.int32)
        k_row, v_row = (wide(K_REF.row), wide(V_REF.row)) if WIDE else (K_REF.row, V_REF.row)
        k = K_REF.data + key_head * K_REF.head
        v = V_REF.data + key_head * V_REF.head
        state = segment(
            STEP, query, state, k, v, INDICES + at, count, k_row, v_row, scale2,
            C, BLOCK_N, STAGES, SPLIT, True, PRECISION,
        )  # fmt: skip
    return state
