r"""Gradient of the queries, and the row sums that both backward kernels need.

    delta = rowsum(dO * O) - dlse
    P = exp(a q k^T - lse)    dS = P * (dO v^T - delta)    dq = a dS k

One program owns BLOCK_M queries of one item and head and walks over the item's keys as the forward kernel does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shared.launch_config import Config
from ...shared.online_softmax import LOG2E, base2_lse, tile_offsets
from ..arguments import Arguments
from .row_blocks import find_tile, tiles_at_most
from .triton_forward import operands, switches
from .triton_walk import walk

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
def _grad_tile(query, state, k_at, v_at, inside, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys and values, at pointers [N, C], joins dq [M, C]."""
    q, grad, pivot, delta = query
    (dq,) = state
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
    return (tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION),)


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
    (dq,) = walk(
        _grad_tile, (q, grad, pivot, delta), (dq,), K, V, K2, V2, K_REF, V_REF, CU_K, INDICES, OFFSETS, item, items,
        key_head, scale2, k_row, k_head, v_row, v_head, k2_row, k2_head, v2_row, v2_head,
        k_ref_row, k_ref_head, v_ref_row, v_ref_head, C, BLOCK_N, STAGES, SPLIT, DENSE, GATHER, PER_HEAD, PRECISION,
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
