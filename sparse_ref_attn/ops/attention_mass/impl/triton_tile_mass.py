r"""Means over each tile's queries, and over the heads.

    mass[t, r] = 1/(N_t H) sum_j sum_h exp(a <q[h, j], k[h, r]> - lse[h, j])          over the queries j of tile t

One program owns a block of queries times a block of reference rows. It adds the weights of all heads (or takes those of
its own head) in registers, and only then sums over tiles: tiles may be small and ragged without the matrix steps
becoming so. A tile that crosses blocks has a part in each. A second kernel adds these up and divides: no atomics, the
same bits every time.

Parts lie in rows of their own without anybody counting them: the part of tile t in block b has row t + b, which grows
along the queries, because of two parts the later one has the later tile, or the later block, or both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shared.launch_config import Config
from ...shared.online_softmax import LOG2E, base2_lse
from ...shared.operand import precision, row_offsets
from .triton_mass import mask_operand, rows_operand, scores_operand

__all__ = ["launch_parts", "launch_tile_mass"]


@triton.jit
def _parts(
    Q, K, LSE, TILES, PARTS, queries, refs, tiles, heads, scale: tl.float32, C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, REDUCED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K begins at the first reference row; PARTS (B, H or 1, T + blocks, R)."""
    block = tl.program_id(0)
    place = tl.program_id(2)
    item = tl.cast(place if REDUCED else place // heads, tl.int64)
    head = 0 if REDUCED else place % heads
    stop = heads if REDUCED else head + 1
    q_at = Q.data + item * Q.item
    k_at = K.data + item * K.item
    lse_at = LSE.data + item * LSE.item
    PARTS += tl.cast(place, tl.int64) * (tiles + tl.num_programs(0)) * refs

    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < queries
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = columns < refs
    q_tile = row_offsets(rows, Q.row, C)
    k_tile = row_offsets(columns, K.row, C)
    lse_at += tl.cast(rows, tl.int64) * LSE.row
    scale2 = scale * LOG2E
    total = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
    for now in tl.range(head, stop, num_stages=STAGES):
        at = tl.cast(now, tl.int64)
        q = tl.load(q_at + at * Q.head + q_tile, mask=inside[:, None], other=0.0)
        k = tl.load(k_at + at * K.head + k_tile, mask=live[:, None], other=0.0)
        pivot = base2_lse(tl.load(lse_at + at * LSE.head, mask=inside, other=float("inf")))
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        total += tl.math.exp2(s * scale2 - pivot[:, None])

    # a row's tile is the number of tiles that end at or before it
    first, last = 0, 0
    last_row = tl.minimum((block + 1) * BLOCK_Q, queries) - 1
    for start in tl.range(0, tiles, BLOCK_T):
        some = start + tl.arange(0, BLOCK_T)
        ends = tl.load(TILES + 1 + some, mask=some < tiles, other=queries)
        first += tl.sum(tl.where(ends <= block * BLOCK_Q, 1, 0))
        last += tl.sum(tl.where(ends <= last_row, 1, 0))
    for tile in tl.range(first, tl.minimum(last + 1, tiles)):
        own = (rows >= tl.load(TILES + tile)) & (rows < tl.load(TILES + tile + 1))
        part = tl.sum(tl.where(own[:, None], total, 0.0), 0)
        tl.store(PARTS + tl.cast(tile + block, tl.int64) * refs + columns, part, mask=live)


@triton.jit
def _means(
    PARTS, MASK, TILES, MASS, blocks, refs, tiles, heads, places, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """PARTS (B x places, T + blocks, R), sums over `heads` heads, and MASK (B, R) -> MASS (B x places, T, R)."""
    tile = tl.program_id(0)
    place = tl.cast(tl.program_id(2), tl.int64)
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < refs
    start, stop = tl.load(TILES + tile), tl.load(TILES + tile + 1)
    PARTS += (place * (tiles + blocks) + tile) * refs
    total = tl.zeros([BLOCK_R], tl.float32)
    if start < stop:
        # within the blocks, whatever the offsets are
        for block in range(tl.maximum(start // BLOCK_Q, 0), tl.minimum((stop - 1) // BLOCK_Q + 1, blocks)):
            total += tl.load(PARTS + tl.cast(block, tl.int64) * refs + rows, mask=live, other=0.0)
    count = tl.cast(tl.maximum(stop - start, 1), tl.float32) * heads
    if MASKED:
        kept = tl.load(MASK.data + place // places * MASK.item + rows, mask=live, other=0)
        total = tl.where(kept != 0, total, 0.0)
    tl.store(MASS + (place * tiles + tile) * refs + rows, total / count, mask=live)


def launch_tile_mass(
    q: Tensor,
    k_ref: Tensor,
    lse: Tensor,
    tiles: Tensor,
    scale: float,
    reduce_heads: bool,
    config: Config,
    key_mask: Tensor | None = None,
) -> Tensor:
    """q (B, N, H, C), k_ref (B, R, H, C), lse (B, H, N), tiles (T + 1,), key_mask (B, R) -> mass (B, H, T, R).

    Without H with `reduce_heads`.
    """
    batch, _, heads, _ = q.shape
    refs, count = k_ref.shape[1], tiles.shape[0] - 1
    shape = (batch, count, refs) if reduce_heads else (batch, heads, count, refs)
    if not q.numel() or not count:
        return torch.zeros(shape, dtype=torch.float32, device=q.device)
    parts = launch_parts(q, k_ref, lse, tiles, scale, reduce_heads, config)
    mass = torch.empty(shape, dtype=torch.float32, device=q.device)
    block = min(1024, triton.next_power_of_2(refs))
    with torch.cuda.device_of(q):
        _means[count, triton.cdiv(refs, block), parts.shape[0]](
            parts, mask_operand(key_mask), tiles, mass, parts.shape[1] - count, refs, count,
            heads if reduce_heads else 1, 1 if reduce_heads else heads, BLOCK_R=block, BLOCK_Q=config.block_m,
            MASKED=key_mask is not None,
        )  # fmt: skip
    return mass


def launch_parts(
    q: Tensor, k_ref: Tensor, lse: Tensor, tiles: Tensor, scale: float, reduce_heads: bool, config: Config
) -> Tensor:
    """What each block adds to each tile, (B or B H, T + blocks, R); rows that are no part's are left alone."""
    batch, queries, heads, C = q.shape
    refs, count = k_ref.shape[1], tiles.shape[0] - 1
    places, blocks = batch if reduce_heads else batch * heads, triton.cdiv(queries, config.block_m)
    parts = torch.empty(places, count + blocks, refs, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _parts[blocks, triton.cdiv(refs, config.block_n), places](
            rows_operand(q), rows_operand(k_ref), scores_operand(lse), tiles, parts, queries, refs, count, heads, scale,
            C=C, BLOCK_R=config.block_n, BLOCK_Q=config.block_m, BLOCK_T=256, STAGES=config.stages,
            REDUCED=reduce_heads, PRECISION=precision(q), num_warps=config.warps, num_stages=config.stages,
            enable_fp_fusion=True,
        )  # fmt: skip
    return parts
