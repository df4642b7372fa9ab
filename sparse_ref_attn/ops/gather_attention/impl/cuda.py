"""The forward of csrc/gather_attention.cu; its backward is Triton's. It never reads a tensor on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels import abi
from ...shared.cuda_launch import DTYPES, index, launch, pointer, tensor
from ..arguments import Arguments

__all__ = ["forward"]


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T), contiguous."""
    queries, heads, channels = a.q.shape
    out = torch.empty_like(a.q, memory_format=torch.contiguous_format)
    lse = a.q.new_empty((heads, queries), dtype=torch.float32)
    if not queries:
        return out, lse
    apart = a.k2 is not None  # without k2, both parts count in k
    arguments = abi.GatherAttentionArgs(
        dtype=DTYPES[a.q.dtype],
        channels=channels,
        heads=heads,
        key_heads=a.key_heads,
        items=a.items,
        query_parts=a.cu_seqlens_q.shape[0],
        dense_parts=0 if a.cu_seqlens_k is None else a.cu_seqlens_k.shape[0],
        selections=0 if a.ref_offsets is None else a.ref_offsets.shape[0],
        queries=queries,
        scale=a.scale,
        q=_packed(a.q),
        k=_packed(a.k),
        v=_packed(a.v),
        k2=_packed(a.k2 if apart else a.k),
        v2=_packed(a.v2 if apart else a.v),
        k_ref=_packed(a.k_ref),
        v_ref=_packed(a.v_ref),
        out=_packed(out),
        lse=pointer(lse),
        cu_seqlens_q=index(a.cu_seqlens_q),
        cu_seqlens_k=index(a.cu_seqlens_k),
        ref_indices=index(a.ref_indices),
        ref_offsets=index(a.ref_offsets),
    )
    launch("sra_gather_attention", arguments, a.q)
    return out, lse


def _packed(x: Tensor | None) -> abi.Tensor:
    """(T, H, C)."""
    return tensor(x) if x is None else tensor(x, row=x.stride(0), head=x.stride(1))
