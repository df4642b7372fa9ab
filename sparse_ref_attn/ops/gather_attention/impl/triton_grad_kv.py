r"""Gradients of keys and values, dense or gathered.

    P = exp(a q k^T - lse)    dS = P * (dO v^T - delta)    dv = sum_h P^T dO    dk = a sum_h dS^T q

One program owns BLOCK_N keys of one item and key/value head, walks over the item's queries in every query head that
shares the key head, and stores once: no atomics. Dense keys are rows of their tensor; gathered keys are named by an
index and stored packed (one row for each entry of the selection) or, where indices are distinct, straight into the
bank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shared.launch_config import Config
from ...shared.online_softmax import LOG2E, base2_lse
from ...shared.operand import Operand, precision, row_offsets, rows_of
from ..arguments import Arguments
from .row_blocks import blocks_at_most, find_block
from .triton_forward import operand, slots

__all__ = ["launch_grad_kv", "launch_grad_kv_gathered"]


@triton.jit
def _grad_kv(
    Q, K, V, GRAD_OUT, GRAD_K, GRAD_V, LSE, DELTA, CU_Q, CU_K, INDICES, items, queries, group, scale: tl.float32,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, Q_PARTS: tl.constexpr,
    K_PARTS: tl.constexpr, K_SLOTS: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, PER_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    key_head = tl.cast(tl.program_id(1), tl.int64)
    if PER_HEAD:
        CU_K += key_head * (items + 1)
    item, first, stop = find_block(CU_K, tl.program_id(0), items, K_PARTS, K_SLOTS, BLOCK_N)
    if first >= stop:
        return
    places = first + tl.arange(0, BLOCK_N)
    live = places < stop
    rows = tl.load(INDICES + places, mask=live, other=0) if GATHER else places
    k = tl.load(rows_of(K, key_head, rows, C), mask=live[:, None], other=0.0)
    v = tl.load(rows_of(V, key_head, rows, C), mask=live[:, None], other=0.0)
    dk = tl.zeros([BLOCK_N, C], tl.float32)
    dv = tl.zeros([BLOCK_N, C], tl.float32)
    scale2 = scale * LOG2E
    columns = tl.arange(0, BLOCK_M)
    q_tile = row_offsets(columns, Q.row, C)
    grad_tile = row_offsets(columns, GRAD_OUT.row, C)
    # The tiles of both of the item's ranges are one loop: the sums of a loop within a loop leave Blackwell's tensor
    # memory at every turn of the outer one, and then do not fit the registers.
    at = tl.load(CU_Q + item).to(tl.int32)
    stop1 = tl.load(CU_Q + item + 1).to(tl.int32)
    tiles = (stop1 - at + BLOCK_M - 1) // BLOCK_M
    more = 0
    if Q_PARTS > 1:
        at2 = tl.load(CU_Q + items + 1 + item).to(tl.int32)
        stop2 = tl.load(CU_Q + items + 1 + item + 1).to(tl.int32)
        more = (stop2 - at2 + BLOCK_M - 1) // BLOCK_M
    for member in range(group):
        head = key_head * group + member
        q_at = Q.data + head * Q.head
        grad_at = GRAD_OUT.data + head * GRAD_OUT.head
        for tile in tl.range(0, tiles + more, num_stages=STAGES):
            if Q_PARTS > 1:
                second = tile >= tiles
                start = tl.where(second, at2 + (tile - tiles) * BLOCK_M, at + tile * BLOCK_M)
                end = tl.where(second, stop2, stop1)
            else:
                start = at + tile * BLOCK_M
                end = stop1
            inside = start + columns < end
            start64 = tl.cast(start, tl.int64)
            q = tl.load(q_at + start64 * Q.row + q_tile, mask=inside[:, None], other=0.0)
            grad = tl.load(grad_at + start64 * GRAD_OUT.row + grad_tile, mask=inside[:, None], other=0.0)
            # queries past the end weigh nothing: exp2(s - inf) = 0
            pivot = base2_lse(tl.load(LSE + head * queries + start + columns, mask=inside, other=float("inf")))
            delta = tl.load(DELTA + head * queries + start + columns, mask=inside, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            p = tl.math.exp2(s * scale2 - pivot[None, :])
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    stored = rows if SCATTER else places
    dk_at = rows_of(GRAD_K, key_head, stored, C)
    dv_at = rows_of(GRAD_V, key_head, stored, C)
    tl.store(dk_at, (dk * scale).to(GRAD_K.data.dtype.element_ty), mask=live[:, None])
    tl.store(dv_at, dv.to(GRAD_V.data.dtype.element_ty), mask=live[:, None])


def launch_grad_kv(
    a: Arguments, k: Tensor, v: Tensor, cu: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """Gradients of one dense tensor's k and v (M, G, C), whose items lie at `cu` (P, B + 1)."""
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if k.shape[0]:
        _launch(a, k, v, dk, dv, cu, None, grad_out, lse, delta, config, k.shape[0], scatter=False)
    return dk, dv


def launch_grad_kv_gathered(
    a: Arguments, grad_out: Tensor, lse: Tensor, delta: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """Gradients of the bank's kept rows.

    With ``a.distinct`` of the bank's shape and dtype. Else packed, float32: (nnz, G, C), or (nnz, 1, C) where each
    entry of the selection belongs to one key/value head.
    """
    assert a.k_ref is not None
    assert a.v_ref is not None
    assert a.ref_indices is not None
    assert a.ref_offsets is not None
    entries = a.ref_indices.shape[0]
    if a.distinct:
        dk, dv = (torch.zeros(a.k_ref.shape, dtype=a.q.dtype, device=a.q.device) for _ in range(2))
    else:
        shape = (entries, 1 if a.per_head else a.key_heads, a.q.shape[2])
        dk, dv = (torch.empty(shape, dtype=torch.float32, device=a.q.device) for _ in range(2))
    if entries:
        _launch(
            a, a.k_ref, a.v_ref, dk, dv, a.ref_offsets, a.ref_indices, grad_out, lse, delta, config, entries,
            scatter=a.distinct,
        )  # fmt: skip
    return dk, dv


def _launch(
    a: Arguments, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, cu: Tensor, indices: Tensor | None, grad_out: Tensor,
    lse: Tensor, delta: Tensor, config: Config, rows: int, scatter: bool,
) -> None:  # fmt: skip
    queries, heads, C = a.q.shape
    per_head = indices is not None and a.per_head
    parts = 1 if per_head else cu.shape[0]
    grid = (blocks_at_most(rows, parts * a.items, config.block_n), a.key_heads)
    # an entry of a head's own selection has one packed row, whatever the head
    stored = [operand(x) if x.shape[1] == a.key_heads else Operand(x, x.stride(0)) for x in (dk, dv)]
    with torch.cuda.device_of(a.q):
        _grad_kv[grid](
            operand(a.q), operand(k), operand(v), operand(grad_out), *stored, lse, delta, a.cu_seqlens_q, cu, indices,
            a.items, queries, heads // a.key_heads, a.scale,
            C=C, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages,
            Q_PARTS=a.cu_seqlens_q.shape[0], K_PARTS=parts, K_SLOTS=slots(cu[:parts]), GATHER=indices is not None,
            SCATTER=scatter, PER_HEAD=per_head, PRECISION=precision(a.q),
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
