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
from ...shared.online_softmax import LOG2E, base2_lse
from ...shared.operand import Operand, rows_of
from ..arguments import Arguments
from .row_blocks import blocks_at_most, find_block
from .triton_forward import operand, operands, switches
from .triton_walk import walk

__all__ = ["launch_delta", "launch_grad_q"]


@triton.jit
def _delta(
    OUT, GRAD_OUT, GRAD_LSE, DELTA, queries, C: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    head = tl.cast(tl.program_id(1), tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < queries
    out = tl.load(rows_of(OUT, head, rows, C), mask=live[:, None], other=0.0)
    grad = tl.load(rows_of(GRAD_OUT, head, rows, C), mask=live[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_LSE:
        lse_at = GRAD_LSE.data + head * GRAD_LSE.head + tl.cast(rows, tl.int64) * GRAD_LSE.row
        delta -= tl.load(lse_at, mask=live, other=0.0)
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
    scale: tl.float32, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, DENSE: tl.constexpr, GATHER: tl.constexpr,
    PER_HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, first, stop = find_block(CU_Q, tl.program_id(0), items, PARTS, SLOTS, BLOCK_M)
    if first >= stop:
        return
    head = tl.cast(tl.program_id(1), tl.int64)
    key_head = head // group
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < stop
    q = tl.load(rows_of(Q, head, rows, C), mask=live[:, None], other=0.0)
    grad = tl.load(rows_of(GRAD_OUT, head, rows, C), mask=live[:, None], other=0.0)
    # rows past the end weigh nothing: exp2(s - inf) = 0
    pivot = base2_lse(tl.load(LSE + head * queries + rows, mask=live, other=float("inf")))
    delta = tl.load(DELTA + head * queries + rows, mask=live, other=0.0)
    scale2 = scale * LOG2E
    dq = tl.zeros([BLOCK_M, C], tl.float32)
    (dq,) = walk(
        _grad_tile, (q, grad, pivot, delta), (dq,), K, V, K2, V2, K_REF, V_REF, CU_K, INDICES, OFFSETS, item, items,
        key_head, scale2, C, BLOCK_N, STAGES, SPLIT, DENSE, GATHER, PER_HEAD, PRECISION, False,
    )  # fmt: skip
    tl.store(rows_of(GRAD_Q, head, rows, C), (dq * scale).to(GRAD_Q.data.dtype.element_ty), mask=live[:, None])


def launch_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Out and grad_out (T, H, C), grad_lse (H, T) -> delta (H, T), float32."""
    queries, heads, C = out.shape
    delta = torch.empty((heads, queries), dtype=torch.float32, device=out.device)
    block = 64
    if queries:
        with torch.cuda.device_of(out):
            _delta[(triton.cdiv(queries, block), heads)](
                operand(out), operand(grad_out),
                Operand() if grad_lse is None else Operand(grad_lse, grad_lse.stride(1), grad_lse.stride(0)),
                delta, queries,
                C=C, BLOCK_M=block, HAS_LSE=grad_lse is not None, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return delta


def launch_grad_q(a: Arguments, grad_out: Tensor, lse: Tensor, delta: Tensor, config: Config) -> Tensor:
    """The gradient of q (T, H, C)."""
    queries, heads, C = a.q.shape
    dq = torch.empty((queries, heads, C), dtype=a.q.dtype, device=a.q.device)
    grid = (blocks_at_most(queries, a.cu_seqlens_q.shape[0] * a.items, config.block_m), heads)
    if queries:
        with torch.cuda.device_of(a.q):
            _grad_q[grid](
                *operands(a), operand(grad_out), operand(dq), lse, delta, a.cu_seqlens_q, a.cu_seqlens_k,
                a.ref_indices, a.ref_offsets, a.items, queries, heads // a.key_heads, a.scale,
                C=C, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, SPLIT=config.split,
                **switches(a),
                num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return dq
