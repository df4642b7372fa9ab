r"""Column means of the generation-to-reference block, and the LSE that they need.

    lse[h, j]  = ln sum_k exp(a <q[h, j], k[h, k]>)                       over all keys
    mass[h, r] = 1/N sum_j exp(a <q[h, j], k[h, r]> - lse[h, j])          over the queries

One program owns one block of reference rows (or, for the LSE, of queries) of one head of one item: no atomics, the same
bits every time. Dense items lie `item` strides apart; ragged ones (RAGGED) begin where `cu_seqlens` says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shared.launch_config import Config
from ...shared.online_softmax import LOG2E, base2_lse, natural_lse, softmax_step
from ...shared.operand import Operand, precision, row_offsets
from ..ragged import Ragged
from .results import empty_lse, empty_mass

__all__ = ["launch_lse", "launch_mass", "mask_operand", "rows_operand", "scores_operand"]


@triton.jit
def _lse(
    Q, K, MASK, LSE, CU_Q, CU_K, queries, keys, scale: tl.float32, query_stride, C: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """LSE of every query_stride-th query; the others' places are left alone."""
    block = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    item = tl.cast(tl.program_id(2), tl.int64)
    q_at = Q.data + item * Q.item + head * Q.head
    k_at = K.data + item * K.item + head * K.head
    lse_at = LSE.data + item * LSE.item + head * LSE.head
    if RAGGED:
        first_query = tl.load(CU_Q + item)
        queries = tl.load(CU_Q + item + 1) - first_query
        first_key = tl.load(CU_K + item)
        keys = tl.load(CU_K + item + 1) - first_key
        q_at += tl.cast(first_query, tl.int64) * Q.row
        k_at += tl.cast(first_key, tl.int64) * K.row
        lse_at += first_query
    if block * BLOCK_Q * query_stride >= queries:
        return
    rows = tl.cast(block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.int64) * query_stride
    live = rows < queries
    q = tl.load(q_at + row_offsets(rows, Q.row, C), mask=live[:, None], other=0.0)
    columns = tl.arange(0, BLOCK_K)
    tile = row_offsets(columns, K.row, C)
    scale2 = scale * LOG2E
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    whole = keys if MASKED else (keys // BLOCK_K) * BLOCK_K  # the tiles that need no mask come first
    for first in tl.range(0, whole, BLOCK_K, num_stages=STAGES):
        start = tl.cast(first, tl.int64)
        if MASKED:
            inside = first + columns < keys
            k = tl.load(k_at + start * K.row + tile, mask=inside[:, None], other=0.0)
            kept = tl.load(MASK.data + item * MASK.item + start + columns, mask=inside, other=0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = tl.where((kept != 0)[None, :], s, float("-inf"))
        else:
            k = tl.load(k_at + start * K.row + tile)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        _, _, m, total = softmax_step(s, m, total, scale2)
    if whole < keys:
        inside = whole + columns < keys
        k = tl.load(k_at + tl.cast(whole, tl.int64) * K.row + tile, mask=inside[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.where(inside[None, :], s, float("-inf"))
        _, _, m, total = softmax_step(s, m, total, scale2)
    tl.store(lse_at + rows, natural_lse(m, total, scale2), mask=live)


@triton.jit
def _mass(
    Q, K, MASK, LSE, MASS, CU_Q, CU_R, FIRST_ROW, queries, refs, scale: tl.float32, query_stride, lse_row: tl.int64,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, STAGES: tl.constexpr, RAGGED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K begins at the first reference row; scores are transposed, [R, Q], so that a row's sum crosses few threads.

    `lse_row`, LSE's own, is no part of it: known to be 1 when compiling, it costs sm_80 one program in five.
    """
    block = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    item = tl.cast(tl.program_id(2), tl.int64)
    q_at = Q.data + item * Q.item + head * Q.head
    k_at = K.data + item * K.item + head * K.head
    lse_at = LSE.data + item * LSE.item + head * LSE.head
    mass_at = MASS.data + item * MASS.item + head * MASS.head
    if RAGGED:
        first_query = tl.load(CU_Q + item)
        queries = tl.load(CU_Q + item + 1) - first_query
        first_out = tl.load(CU_R + item)
        refs = tl.load(CU_R + item + 1) - first_out
        q_at += tl.cast(first_query, tl.int64) * Q.row
        k_at += tl.cast(tl.load(FIRST_ROW + item), tl.int64) * K.row
        lse_at += tl.cast(first_query, tl.int64) * lse_row
        mass_at += first_out
    if block * BLOCK_R >= refs:
        return
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < refs
    k = tl.load(k_at + row_offsets(rows, K.row, C), mask=live[:, None], other=0.0)
    count = (queries + query_stride - 1) // query_stride
    columns = tl.arange(0, BLOCK_Q)
    q_step = tl.cast(Q.row, tl.int64) * query_stride
    lse_step = lse_row * query_stride
    tile = row_offsets(columns, q_step, C)
    scale2 = scale * LOG2E
    total = tl.zeros([BLOCK_R], tl.float32)
    # the next tile's LSE travels in a register, so that no load waits inside the loop
    next_lse = tl.load(lse_at + columns * lse_step, mask=columns < count, other=float("inf"))
    for first in tl.range(0, count, BLOCK_Q, num_stages=STAGES):
        pivot = base2_lse(next_lse)
        after = first + BLOCK_Q + columns
        next_lse = tl.load(lse_at + tl.cast(after, tl.int64) * lse_step, mask=after < count, other=float("inf"))
        inside = first + columns < count
        q = tl.load(q_at + tl.cast(first, tl.int64) * q_step + tile, mask=inside[:, None], other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        total += tl.sum(tl.math.exp2(s * scale2 - pivot[None, :]), 1)
    mass = total / tl.maximum(count, 1)
    if MASKED:
        kept = tl.load(MASK.data + item * MASK.item + rows, mask=live, other=0)
        mass = tl.where(kept != 0, mass, 0.0)
    tl.store(mass_at + rows, mass, mask=live)


def launch_lse(
    q: Tensor,
    k: Tensor,
    scale: float,
    query_stride: int,
    config: Config,
    key_mask: Tensor | None = None,
    ragged: Ragged | None = None,
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C) -> lse (B, H, N), of every `query_stride`-th query only; packed rows as B = 1."""
    _, queries, heads, C = q.shape
    lse, longest, items = empty_lse(q, ragged)
    grid = (triton.cdiv(triton.cdiv(longest, query_stride), config.block_m), heads, items)
    if lse.numel() and items:
        with torch.cuda.device_of(q):
            _lse[grid](
                rows_operand(q, ragged), rows_operand(k, ragged), mask_operand(key_mask), scores_operand(lse, ragged),
                *((None, None) if ragged is None else (ragged.cu_seqlens_q, ragged.cu_seqlens_k)), queries, k.shape[1],
                scale, query_stride, C=C, BLOCK_Q=config.block_m, BLOCK_K=config.block_n, STAGES=config.stages,
                RAGGED=ragged is not None, MASKED=key_mask is not None, PRECISION=precision(q),
                num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return lse


def launch_mass(
    q: Tensor,
    k_ref: Tensor,
    lse: Tensor,
    scale: float,
    query_stride: int,
    config: Config,
    key_mask: Tensor | None = None,
    ragged: Ragged | None = None,
    total_ref: int | None = None,
) -> Tensor:
    """q (B, N, H, C), k_ref (B, R, H, C), lse (B, H, N), key_mask (B, R) -> mass (B, H, R); packed rows as B = 1.

    With `ragged`, k_ref holds every packed key row and the result is (1, H, total_ref).
    """
    _, queries, heads, C = q.shape
    mass, longest, items = empty_mass(q, k_ref, ragged, total_ref)
    grid = (triton.cdiv(longest, config.block_n), heads, items)
    if mass.numel() and items:
        with torch.cuda.device_of(q):
            _mass[grid](
                rows_operand(q, ragged), rows_operand(k_ref, ragged), mask_operand(key_mask),
                scores_operand(lse, ragged), scores_operand(mass, ragged),
                *((None, None, None) if ragged is None else (ragged[0], ragged[2], ragged[3])), queries, mass.shape[2],
                scale, query_stride, lse.stride(2), C=C, BLOCK_R=config.block_n,
                BLOCK_Q=config.block_m, STAGES=config.stages, RAGGED=ragged is not None, MASKED=key_mask is not None,
                PRECISION=precision(q), num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return mass


def rows_operand(x: Tensor, ragged: Ragged | None = None) -> Operand:
    """(B, N, H, C), or packed rows (1, T, H, C)."""
    item, row, head, _ = x.stride()
    return Operand(x, row, head, item if ragged is None else 0)


def scores_operand(x: Tensor, ragged: Ragged | None = None) -> Operand:
    """(B, H, N), or those of packed rows (1, H, T)."""
    item, head, row = x.stride()
    return Operand(x, row, head, item if ragged is None else 0)


def mask_operand(mask: Tensor | None) -> Operand:
    """(B, N), whose rows must be contiguous: a kernel reads 64 or more neighbours at a time."""
    return Operand() if mask is None else Operand(mask.view(torch.uint8), item=mask.stride(0))
