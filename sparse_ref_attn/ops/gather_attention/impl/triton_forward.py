r"""The forward kernel: one online softmax over at most two dense segments and the gathered rows of the bank.

    s = <q, k>    m = running max of s    total = sum exp(a s - a m)    acc = sum exp(a s - a m) v
    out = acc / total    lse = a m + ln total

One program owns BLOCK_M queries of one item and head, and walks over the item's keys (`triton_walk`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shared.launch_config import Config
from ...shared.online_softmax import LOG2E, natural_lse, softmax_step
from ...shared.operand import Operand, precision, row_offsets, rows_of, wide
from ..arguments import Arguments
from .row_blocks import blocks_at_most, find_block
from .triton_walk import walk

__all__ = ["attend_keys", "launch_forward", "operand", "operands", "slots", "switches"]


@triton.jit
def attend_keys(query, state, k_at, v_at, inside, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys and values, at pointers [N, C], joins acc [M, C], m [M] and total [M]."""
    (q,) = query
    acc, m, total = state
    k = tl.load(k_at, mask=inside[:, None], other=0.0) if MASKED else tl.load(k_at)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))
    p, alpha, m, total = softmax_step(s, m, total, scale2)
    v = tl.load(v_at, mask=inside[:, None], other=0.0) if MASKED else tl.load(v_at)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m, total


@triton.jit
def _forward(
    Q, K, V, K2, V2, K_REF, V_REF, OUT, LSE, CU_Q, CU_K, INDICES, OFFSETS, items, queries, group, scale: tl.float32,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    PARTS: tl.constexpr, SLOTS: tl.constexpr, DENSE: tl.constexpr, GATHER: tl.constexpr, PER_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    item, first, stop = find_block(CU_Q, tl.program_id(0), items, PARTS, SLOTS, BLOCK_M)
    if first >= stop:
        return
    head = tl.cast(tl.program_id(1), tl.int64)
    key_head = head // group
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < stop
    # int64 strides here and, above a head dim of 32, in the walk: then no form of the call spills on sm_80
    q = tl.load(Q.data + head * Q.head + row_offsets(rows, wide(Q.row), C), mask=live[:, None], other=0.0)
    scale2 = scale * LOG2E
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    acc, m, total = walk(
        attend_keys, (q,), (acc, m, total), K, V, K2, V2, K_REF, V_REF, CU_K, INDICES, OFFSETS, item, items,
        key_head, scale2, C, BLOCK_N, STAGES, SPLIT, DENSE, GATHER, PER_HEAD, PRECISION, C > 32,
    )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(rows_of(OUT, head, rows, C), acc.to(OUT.data.dtype.element_ty), mask=live[:, None])
    tl.store(LSE + head * queries + rows, natural_lse(m, total, scale2), mask=live)


def launch_forward(a: Arguments, config: Config, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Out (T, H, C), in the dtype of q or in `dtype`, and lse (H, T); reads no offset on the host."""
    queries, heads, C = a.q.shape
    out = torch.empty((queries, heads, C), dtype=dtype or a.q.dtype, device=a.q.device)
    lse = torch.empty((heads, queries), dtype=torch.float32, device=a.q.device)
    parts = a.cu_seqlens_q.shape[0]
    grid = (blocks_at_most(queries, parts * a.items, config.block_m), heads)
    if queries:
        with torch.cuda.device_of(a.q):
            _forward[grid](
                *operands(a), operand(out), lse, a.cu_seqlens_q, a.cu_seqlens_k, a.ref_indices, a.ref_offsets,
                a.items, queries, heads // a.key_heads, a.scale,
                C=C, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, SPLIT=config.split,
                **switches(a),
                num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse


def operand(x: Tensor | None) -> Operand:
    """Packed rows (T, H, C), or no tensor."""
    return Operand() if x is None else Operand(x, x.stride(0), x.stride(1))


def operands(a: Arguments) -> list[Operand]:
    """q, k, v, k2, v2, k_ref, v_ref; two ranges of one dense tensor are two segments of the same tensor."""
    tensors = list(a.tensors)
    if a.cu_seqlens_k is not None and a.cu_seqlens_k.shape[0] == 2 and a.k2 is None:
        tensors[3:5] = tensors[1:3]
    return [operand(x) for x in tensors]


def switches(a: Arguments) -> dict[str, int | bool | str]:
    """What the kernels that walk over an item's keys must know when compiling."""
    return {
        "PARTS": a.cu_seqlens_q.shape[0],
        "SLOTS": slots(a.cu_seqlens_q),
        "DENSE": 0 if a.cu_seqlens_k is None else a.cu_seqlens_k.shape[0],
        "GATHER": a.ref_indices is not None,
        "PER_HEAD": a.per_head,
        "PRECISION": precision(a.q),
    }


def slots(cu_seqlens: Tensor) -> int:
    """The power of two that holds one number for each range of (P, B + 1) offsets."""
    return triton.next_power_of_2(cu_seqlens.shape[0] * (cu_seqlens.shape[1] - 1))
