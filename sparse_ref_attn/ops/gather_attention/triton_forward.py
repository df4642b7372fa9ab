r"""The forward kernel: one online softmax over at most two dense segments and the gathered rows of the bank.

    s = <q, k>    m = running max of s    total = sum exp(a s - a m)    acc = sum exp(a s - a m) v
    out = acc / total    lse = a m + ln total

One program owns BLOCK_M queries of one item and head. The dense loop and the gathered loop are one function; they
differ only in how they find a row: the gathered one reads the *next* tile's indices while it works on this one, so that
the rows' addresses are known in time for the asynchronous copies.

Proved under the interpreter and compiled ahead of time; not yet run on a card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ranges import find_tile, tiles_at_most
from .._tiles import LOG2E, natural_lse, softmax_step, tile_offsets
from .._tuning import Config
from .arguments import Arguments

__all__ = ["launch_forward", "operands", "precision", "slots", "switches"]


@triton.jit
def _attend_tile(q, acc, m, total, k_at, v_at, inside, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys and values, at pointers [N, C], joins acc [M, C], m [M] and total [M]."""
    k = tl.load(k_at, mask=inside[:, None], other=0.0) if MASKED else tl.load(k_at)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))
    p, alpha, m, total = softmax_step(s, m, total, scale2)
    v = tl.load(v_at, mask=inside[:, None], other=0.0) if MASKED else tl.load(v_at)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m, total


@triton.jit
def _attend_keys(
    q, acc, m, total, K, V, INDICES, start, count, k_row, v_row, scale2, C: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
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
        acc, m, total = _attend_tile(q, acc, m, total, k_at, v_at, first + columns < count, scale2, MASKED, PRECISION)
    return acc, m, total


@triton.jit
def _attend_segment(
    q, acc, m, total, K, V, INDICES, count, k_row, v_row, scale2, C: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` keys; with SPLIT the whole tiles first, in a loop that needs no mask."""
    whole = 0
    if SPLIT:
        whole = (count // BLOCK_N) * BLOCK_N
        acc, m, total = _attend_keys(
            q, acc, m, total, K, V, INDICES, 0, whole, k_row, v_row, scale2,
            C, BLOCK_N, STAGES, GATHER, False, PRECISION,
        )  # fmt: skip
    # a loop even for one tile: its rows are copied asynchronously and take no registers on the way
    return _attend_keys(
        q, acc, m, total, K, V, INDICES, whole, count, k_row, v_row, scale2,
        C, BLOCK_N, STAGES, GATHER, True, PRECISION,
    )  # fmt: skip


@triton.jit
def _forward(
    Q, K, V, K2, V2, K_REF, V_REF, OUT, LSE, CU_Q, CU_K, INDICES, OFFSETS, items, queries, group, scale: tl.float32,
    q_row: tl.int64, q_head: tl.int64, k_row: tl.int64, k_head: tl.int64, v_row: tl.int64, v_head: tl.int64,
    k2_row: tl.int64, k2_head: tl.int64, v2_row: tl.int64, v2_head: tl.int64,
    k_ref_row: tl.int64, k_ref_head: tl.int64, v_ref_row: tl.int64, v_ref_head: tl.int64,
    out_row: tl.int64, out_head: tl.int64,
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
    scale2 = scale * LOG2E
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    if DENSE > 0:
        at = tl.load(CU_K + item).to(tl.int64)
        count = (tl.load(CU_K + item + 1) - at).to(tl.int32)
        k = K + key_head * k_head + at * k_row
        v = V + key_head * v_head + at * v_row
        acc, m, total = _attend_segment(
            q, acc, m, total, k, v, INDICES, count, k_row, v_row, scale2,
            C, BLOCK_N, STAGES, SPLIT, False, PRECISION,
        )  # fmt: skip
    if DENSE > 1:
        at = tl.load(CU_K + items + 1 + item).to(tl.int64)
        count = (tl.load(CU_K + items + 1 + item + 1) - at).to(tl.int32)
        k = K2 + key_head * k2_head + at * k2_row
        v = V2 + key_head * v2_head + at * v2_row
        acc, m, total = _attend_segment(
            q, acc, m, total, k, v, INDICES, count, k2_row, v2_row, scale2,
            C, BLOCK_N, STAGES, SPLIT, False, PRECISION,
        )  # fmt: skip
    if GATHER:
        if PER_HEAD:
            OFFSETS += key_head * (items + 1)
        at = tl.load(OFFSETS + item).to(tl.int64)
        count = (tl.load(OFFSETS + item + 1) - at).to(tl.int32)
        k = K_REF + key_head * k_ref_head
        v = V_REF + key_head * v_ref_head
        acc, m, total = _attend_segment(
            q, acc, m, total, k, v, INDICES + at, count, k_ref_row, v_ref_row, scale2,
            C, BLOCK_N, STAGES, SPLIT, True, PRECISION,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out = OUT + head * out_head + tile_offsets(rows, out_row, C)
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=live[:, None])
    tl.store(LSE + head * queries + rows, natural_lse(m, total, scale2), mask=live)


def launch_forward(a: Arguments, config: Config) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T); reads no offset on the host."""
    queries, heads, C = a.q.shape
    out = torch.empty((queries, heads, C), dtype=a.q.dtype, device=a.q.device)
    lse = torch.empty((heads, queries), dtype=torch.float32, device=a.q.device)
    parts = a.cu_seqlens_q.shape[0]
    grid = (tiles_at_most(queries, parts * a.items, config.block_m), heads)
    if queries:
        tensors, strides = operands(a)
        with torch.cuda.device_of(a.q):
            _forward[grid](
                *tensors, out, lse, a.cu_seqlens_q, a.cu_seqlens_k, a.ref_indices, a.ref_offsets,
                a.items, queries, heads // a.key_heads, a.scale, *strides, out.stride(0), out.stride(1),
                C=C, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages, SPLIT=config.split,
                **switches(a),
                num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse


def operands(a: Arguments) -> tuple[list[Tensor | None], list[int]]:
    """q, k, v, k2, v2, k_ref, v_ref and the (row, head) strides of each; absent tensors have strides 0.

    Two ranges of one dense tensor are two segments of the same tensor.
    """
    tensors = list(a.tensors)
    if a.cu_seqlens_k is not None and a.cu_seqlens_k.shape[0] == 2 and a.k2 is None:
        tensors[3:5] = tensors[1:3]
    return tensors, [s for x in tensors for s in ((0, 0) if x is None else x.stride()[:2])]


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


def precision(x: Tensor) -> str:
    """Only float32 has a choice, and runs under the interpreter only."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
