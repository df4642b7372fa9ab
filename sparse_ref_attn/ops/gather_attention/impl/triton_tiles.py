r"""The kernel of query tiles: what a tile has of its own joins the softmax over what its item's tiles share.

    s = <q, k> (+ bias / a, for the keys of k2)    m = running max of s    total = sum exp(a s - a m)
    acc = sum exp(a s - a m) v    out = acc / total    lse = a m + ln total

The forward kernel runs first over the shared keys, with blocks as large as ever: blocks of a tile's size would read
them from memory again for every tile. Its results are a softmax under way, m = lse / a, total = 1, acc = out, kept in
float32; here one program owns BLOCK_M queries of one tile and head and goes on with it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shared.launch_config import Config
from ...shared.online_softmax import LOG2E, natural_lse, softmax_step
from ...shared.operand import Operand, precision, row_offsets, rows_of
from ..arguments import Arguments
from .row_blocks import blocks_at_most
from .triton_forward import attend_keys, operand, operands, slots
from .triton_walk import segment

__all__ = ["block_of", "launch_tiles"]

MOST_SLOTS = 1024  # tiles among which a program looks at once


@triton.jit
def _find_tile(CU_TILES, block, tiles, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Tile, first row and the tile's end of the `block`-th block of rows; first row and end 0 where there is none."""
    before = 0
    tile = 0
    first = 0
    end = 0
    for base in range(0, tiles, SLOTS):
        slot = base + tl.arange(0, SLOTS)
        start = tl.load(CU_TILES + slot, mask=slot < tiles, other=0).to(tl.int32)
        stop = tl.load(CU_TILES + slot + 1, mask=slot < tiles, other=0).to(tl.int32)
        blocks = (stop - start + BLOCK - 1) // BLOCK
        ends = before + tl.cumsum(blocks, 0)
        here = (block >= ends - blocks) & (block < ends)
        tile += tl.sum(tl.where(here, slot, 0), 0)
        first += tl.sum(tl.where(here, start + (block - ends + blocks) * BLOCK, 0), 0)
        end += tl.sum(tl.where(here, stop, 0), 0)
        before += tl.sum(blocks, 0)
    return tile, first, end


@triton.jit
def _item_of(CU_Q, row, items, PARTS: tl.constexpr, SLOTS: tl.constexpr):
    """The item that a row of q belongs to."""
    slot = tl.arange(0, SLOTS)
    part = slot // items
    item = slot % items
    at = CU_Q + part * (items + 1) + item
    start = tl.load(at, mask=part < PARTS, other=0).to(tl.int32)
    stop = tl.load(at + 1, mask=part < PARTS, other=0).to(tl.int32)
    return tl.sum(tl.where((row >= start) & (row < stop), item, 0), 0)


@triton.jit
def _biased(
    q, state, K, V, BIAS, count, width, k_row, v_row, scale, scale2, C: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` keys whose scores have a bias [width] that all queries of the tile share.

    The loop goes by `width`, the same for all programs: by `count` ptxas serializes matrix steps on Hopper (C7518).
    """
    acc, m, total = state
    columns = tl.arange(0, BLOCK_N)
    k_tile = row_offsets(columns, k_row, C)
    v_tile = row_offsets(columns, v_row, C)
    for first in tl.range(0, width, BLOCK_N, num_stages=STAGES):
        inside = first + columns < count
        bias = tl.load(BIAS + first + columns, mask=inside, other=float("-inf"))
        k = tl.load(K + tl.cast(first, tl.int64) * k_row + k_tile, mask=inside[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) + (bias / scale)[None, :]
        p, alpha, m, total = softmax_step(s, m, total, scale2)
        v = tl.load(V + tl.cast(first, tl.int64) * v_row + v_tile, mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m, total


@triton.jit
def _tiles(
    Q, K2, V2, K_REF, V_REF, SHARED, OUT, LSE, CU_TILES, CU_Q, CU_K, INDICES, OFFSETS, BIAS,
    tiles, items, queries, width, group, scale: tl.float32,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, ITEM_SLOTS: tl.constexpr, CARRY: tl.constexpr, BIASED: tl.constexpr,
    GATHER: tl.constexpr, PER_HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, first, stop = _find_tile(CU_TILES, tl.program_id(0), tiles, SLOTS, BLOCK_M)
    if first >= stop:
        return
    item = _item_of(CU_Q, first, items, PARTS, ITEM_SLOTS) if BIASED else 0
    head = tl.cast(tl.program_id(1), tl.int64)
    key_head = head // group
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < stop
    q = tl.load(rows_of(Q, head, rows, C), mask=live[:, None], other=0.0)
    scale2 = scale * LOG2E
    lse_at = LSE + head * queries + rows
    if CARRY:
        lse = tl.load(lse_at, mask=live, other=float("-inf"))
        m = lse / scale
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.load(rows_of(SHARED, head, rows, C), mask=live[:, None], other=0.0)
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, C], tl.float32)
    if BIASED:
        at = tl.load(CU_K + items + 1 + item).to(tl.int64)
        count = (tl.load(CU_K + items + 1 + item + 1) - at).to(tl.int32)
        k = K2.data + key_head * K2.head + at * K2.row
        v = V2.data + key_head * V2.head + at * V2.row
        acc, m, total = _biased(
            q, (acc, m, total), k, v, BIAS.data + tl.cast(tile, tl.int64) * BIAS.row, count, width, K2.row, V2.row,
            scale, scale2, C, BLOCK_N, STAGES, PRECISION,
        )  # fmt: skip
    if GATHER:
        if PER_HEAD:
            OFFSETS += key_head * (tiles + 1)
        at = tl.load(OFFSETS + tile).to(tl.int64)
        count = (tl.load(OFFSETS + tile + 1) - at).to(tl.int32)
        k = K_REF.data + key_head * K_REF.head
        v = V_REF.data + key_head * V_REF.head
        acc, m, total = segment(
            attend_keys, (q,), (acc, m, total), k, v, INDICES + at, count, K_REF.row, V_REF.row, scale2,
            C, BLOCK_N, STAGES, SPLIT, True, PRECISION,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(rows_of(OUT, head, rows, C), acc.to(OUT.data.dtype.element_ty), mask=live[:, None])
    tl.store(lse_at, natural_lse(m, total, scale2), mask=live)


def launch_tiles(a: Arguments, shared: Tensor | None, lse: Tensor, config: Config) -> Tensor:
    """Out (T, H, C) from that of the shared keys, float32, or from None; `lse` (H, T) becomes that of all keys.

    Reads no offset on the host.
    """
    queries, heads, C = a.q.shape
    out = torch.empty((queries, heads, C), dtype=a.q.dtype, device=a.q.device)
    if queries:
        q, _, _, *others = operands(a)
        with torch.cuda.device_of(a.q):
            _tiles[blocks_at_most(queries, a.tiles, config.block_m), heads](
                q, *others, operand(shared), operand(out), lse, a.cu_tiles, a.cu_seqlens_q, a.cu_seqlens_k,
                a.ref_indices, a.ref_offsets, Operand() if a.bias is None else Operand(a.bias, a.bias.stride(0)),
                a.tiles, a.items, queries, 0 if a.bias is None else a.bias.shape[1], heads // a.key_heads, a.scale,
                C=C, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, SPLIT=config.split,
                SLOTS=min(triton.next_power_of_2(a.tiles), MOST_SLOTS), PARTS=a.cu_seqlens_q.shape[0],
                ITEM_SLOTS=slots(a.cu_seqlens_q), CARRY=shared is not None, BIASED=a.bias is not None,
                GATHER=a.ref_indices is not None, PER_HEAD=a.per_head, PRECISION=precision(a.q),
                num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def block_of(a: Arguments) -> int:
    """Queries of a block, 16 or 64: by the mean tile, which the shapes tell."""
    return 64 if a.q.shape[0] > 32 * a.tiles else 16
