r"""Gradient of the queries, and the row sums that both backward kernels need.

    delta = rowsum(dO * O) - dlse
    P = exp(a q k^T - lse)    dS = P * (dO v^T - delta)    dq = a dS k

One program owns BLOCK_M queries of one item and head and walks over the item's keys as the forward kernel does.

Proved under the interpreter and compiled ahead of time; not yet run on a card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ranges import find_tile, tiles_at_most
from .._tiles import LOG2E, base2_lse, tile_offsets
from .._tuning import Config
from .arguments import Arguments
from .triton_forward import operands, switches

__all__ = ["launch_delta", "launch_grad_q"]


@triton.jit
def _delta(
    OUT, GRAD_OUT, GRAD_LSE, DELTA, queries,
    out_row: tl.int64, out_head: tl.int64, grad_row: tl.int64, grad_head: tl.int64, lse_head: tl.int64,
    lse_row: tl.int64, C: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    head = tl.cast(tl.program_id(1), tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < queries
    out = tl.load(OUT + head * out_head + tile_offsets(rows, out_row, C), mask=live[:, None], other=0.0)
    grad = tl.load(GRAD_OUT + head * grad_head + tile_offsets(rows, grad_row, C), mask=live[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_LSE:
        delta -= tl.load(GRAD_LSE + head * lse_head + tl.cast(rows, tl.int64) * lse_row, mask=live, other=0.0)
    tl.store(DELTA + head * queries + rows, delta, mask=live)


@triton.jit
def _grad_tile(q, grad, pivot, delta, dq, k_at, v_at, inside, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys and values, at pointers [N, C], joins dq [M, C]."""
    if MASKED:
        k = tl.load(k_at, mask=inside[:, None], other=0.0)
        v = tl.load(v_at, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.math.exp2(s * scale2 - pivot[:, None])
    if MASKED:
        p = tl.where(inside[None, :], p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _grad_keys(
    q, grad, pivot, delta, dq, K, V, INDICES, start, count, k_row, v_row, scale2, C: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys start .. count: those rows of K and V, or (GATHER) the rows named by those INDICES."""
    columns = tl.arange(0, BLOCK_N)
    if GATHER:
        following = tl.load(INDICES + start + columns, mask=start + columns < count, other=0)
    else:
        k_tile = tile_offsets(columns, k_row, C)
        v_tile = tile_offsets(columns, v_row, C)
    for first in tl.range(start, count, BLOCK_N, num_stages=STAGES):
        if GATHER:
            k_at = K + tile_offsets(following, k_row, C)
            v_at = V + tile_offsets(following, v_row, C)
            after = first + BLOCK_N + columns
            following = tl.load(INDICES + after, mask=after < count, other=0)
        else:
            k_at = K + tl.cast(first, tl.int64) * k_row + k_tile
            v_at = V + tl.cast(first, tl.int64) * v_row + v_tile
        dq = _grad_tile(q, grad, pivot, delta, dq, k_at, v_at, first + columns < count, scale2, MASKED, PRECISION)
    return dq


@triton.jit
def _grad_segment(
    q, grad, pivot, delta, dq, K, V, INDICES, count, k_row, v_row, scale2, C: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` keys; with SPLIT the whole tiles first, in a loop that needs no mask."""
    whole = 0
    if SPLIT:
        whole = (count // BLOCK_N) * BLOCK_N
        dq = _grad_keys(
            q, grad, pivot, delta, dq, K, V, INDICES, 0, whole, k_row, v_row, scale2,
            C, BLOCK_N, STAGES, GATHER, False, PRECISION,
        )  # fmt: skip
    return _grad_keys(
        q, grad, pivot, delta, dq, K, V, INDICES, whole, count, k_row, v_row, scale2,
        C, BLOCK_N, STAGES, GATHER, True, PRECISION,
    )  # fmt: skip


@triton.jit
def _grad_q(
    Q, K, V, K2, V2, K_REF, V_REF, GRAD_OUT, GRAD_Q, LSE, DELTA, CU_Q, CU_K, INDICES, OFFSETS, items, queries, group,
    scale: tl.float32, q_row: tl.int64, q_head: tl.int64, k_row: tl.int64, k_head: tl.int64, v_row: tl.int64,
    v_head: tl.int64, k2_row: tl.int64, k2_head: tl.int64, v2_row: tl.int64, v2_head: tl.int64,
    k_ref_row: tl.int64, k_ref_head: tl.int64, v_ref_row: tl.int64, v_ref_head: tl.int64,
    grad_row: tl.int64, grad_head: tl.int64, dq_row: tl.int64, dq_head: tl.int64,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    PARTS: tl.constexpr, SLOTS: tl.constexpr, DENSE: tl.constexpr, GATHER: tl.constexpr, PER_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    item, first, stop = find_tile(CU_Q, tl.program_id(0), items, PARTS, SLOTS, BLOCK_M)
    if first >= stop:
        return
    head = tl.cast(tl.program_id(1), tl.int64)
    key_head = head // group
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < stop
    q = tl.load(Q + head * q_head + tile_offsets(rows, q_row, C), mask=live[:, None], other=0.0)
    grad = tl.load(GRAD_OUT + head * grad_head + tile_offsets(rows, grad_row, C), mask=live[:, None], other=0.0)
    # rows past the end weigh nothing: exp2(s - inf) = 0
    pivot = base2_lse(tl.load(LSE + head * queries + rows, mask=live, other=float("inf")))
    delta = tl.load(DELTA + head * queries + rows, mask=live, other=0.0)
    scale2 = scale * LOG2E
    dq = tl.zeros([BLOCK_M, C], tl.float32)
    if DENSE > 0:
        at = tl.load(CU_K + item).to(tl.int64)
        count = (tl.load(CU_K + item + 1) - at).to(tl.int32)
        k = K + key_head * k_head + at * k_row
        v = V + key_head * v_head + at * v_row
        dq = _grad_segment(
            q, grad, pivot, delta, dq, k, v, INDICES, count, k_row, v_row, scale2,
            C, BLOCK_N, STAGES, SPLIT, False, PRECISION,
        )  # fmt: skip
    if DENSE > 1:
        at = tl.load(CU_K + items + 1 + item).to(tl.int64)
        count = (tl.load(CU_K + items + 1 + item + 1) - at).to(tl.int32)
        k = K2 + key_head * k2_head + at * k2_row
        v = V2 + key_head * v2_head + at * v2_row
        dq = _grad_segment(
            q, grad, pivot, delta, dq, k, v, INDICES, count, k2_row, v2_row, scale2,
            C, BLOCK_N, STAGES, SPLIT, False, PRECISION,
        )  # fmt: skip
    if GATHER:
        if PER_HEAD:
            OFFSETS += key_head * (items + 1)
        at = tl.load(OFFSETS + item).to(tl.int64)
        count = (tl.load(OFFSETS + item + 1) - at).to(tl.int32)
        k = K_REF + key_head * k_ref_head
        v = V_REF + key_head * v_ref_head
        dq = _grad_segment(
            q, grad, pivot, delta, dq, k, v, INDICES + at, count, k_ref_row, v_ref_row, scale2,
            C, BLOCK_N, STAGES, SPLIT, True, PRECISION,
        )  # fmt: skip
    at = GRAD_Q + head * dq_head + tile_offsets(rows, dq_row, C)
    tl.store(at, (dq * scale).to(GRAD_Q.dtype.element_ty), mask=live[:, None])


def launch_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Out and grad_out (T, H, C), grad_lse (H, T) -> delta (H, T), float32."""
    queries, heads, C = out.shape
    delta = torch.empty((heads, queries), dtype=torch.float32, device=out.device)
    block = 64
    if queries:
        with torch.cuda.device_of(out):
            _delta[(triton.cdiv(queries, block), heads)](
                out, grad_out, grad_lse, delta, queries, *out.stride()[:2], *grad_out.stride()[:2],
                *((0, 0) if grad_lse is None else grad_lse.stride()),
                C=C, BLOCK_M=block, HAS_LSE=grad_lse is not None, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return delta


def launch_grad_q(a: Arguments, grad_out: Tensor, lse: Tensor, delta: Tensor, config: Config) -> Tensor:
    """The gradient of q (T, H, C)."""
    queries, heads, C = a.q.shape
    dq = torch.empty((queries, heads, C), dtype=a.q.dtype, device=a.q.device)
    grid = (tiles_at_most(queries, a.cu_seqlens_q.shape[0] * a.items, config.block_m), heads)
    if queries:
        tensors, strides = operands(a)
        with torch.cuda.device_of(a.q):
            _grad_q[grid](
                *tensors, grad_out, dq, lse, delta, a.cu_seqlens_q, a.cu_seqlens_k, a.ref_indices, a.ref_offsets,
                a.items, queries, heads // a.key_heads, a.scale, *strides, *grad_out.stride()[:2], *dq.stride()[:2],
                C=C, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, SPLIT=config.split,
                **switches(a),
                num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return dq
