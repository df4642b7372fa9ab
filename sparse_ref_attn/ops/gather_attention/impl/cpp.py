"""Selections of query tiles by csrc/cpu: each tile attends to its biased keys and to the rows that it names.

What all tiles of an item share is dense, and PyTorch's; the kernel goes on from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels import abi, cpu_abi
from ....kernels.cpu_library import library
from ...shared.cuda_launch import index, pointer, tensor
from ..arguments import Arguments, HostLayout
from . import sdpa

__all__ = ["DTYPES", "forward"]

DTYPES = {torch.bfloat16: 1, torch.float32: 2}


def forward(a: Arguments, layout: HostLayout | None = None) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T), contiguous."""
    queries, heads, channels = a.q.shape
    shared = a.shared
    if shared is None:
        out = torch.empty_like(a.q, memory_format=torch.contiguous_format)
        lse = a.q.new_empty((heads, queries), dtype=torch.float32)
    else:
        layout = HostLayout.of(a) if layout is None else layout
        shared_layout = HostLayout(layout.queries, layout.segments[: len(shared.segments)], [], [])
        out, lse = sdpa.forward(shared, shared_layout)
    if not queries:
        return out, lse
    # a tensor without elements has no address
    k2 = v2 = cu_means = k_ref = v_ref = ref_indices = ref_offsets = None
    if a.bias is not None and a.cu_seqlens_k is not None and a.k2 is not None and a.k2.shape[0]:
        k2, v2, cu_means = a.k2, a.v2, a.cu_seqlens_k[1].contiguous()
    if a.ref_indices is not None and a.ref_indices.shape[0]:
        k_ref, v_ref, ref_indices, ref_offsets = a.k_ref, a.v_ref, a.ref_indices, a.ref_offsets
    cu_q = a.cu_seqlens_q.contiguous()
    loaded = library()
    arguments = cpu_abi.AttendTilesArgs(
        dtype=DTYPES[a.q.dtype],
        channels=channels,
        heads=heads,
        key_heads=a.key_heads,
        items=a.items,
        query_parts=cu_q.shape[0],
        selections=0 if ref_offsets is None else ref_offsets.shape[0],
        carry=shared is not None,
        threads=torch.get_num_threads(),
        target=loaded.target,
        tiles=a.tiles,
        queries=queries,
        bank=0 if k_ref is None else k_ref.shape[0],
        means=0 if k2 is None else k2.shape[0],
        scale=a.scale,
        q=_packed(a.q),
        k2=_packed(k2),
        v2=_packed(v2),
        k_ref=_packed(k_ref),
        v_ref=_packed(v_ref),
        out=_packed(out),
        lse=pointer(lse),
        bias=pointer(a.bias),
        bias_row=0 if a.bias is None else a.bias.stride(0),
        cu_tiles=index(a.cu_tiles),
        cu_seqlens_q=index(cu_q),
        cu_means=index(cu_means),
        ref_indices=index(ref_indices),
        ref_offsets=index(ref_offsets),
    )
    room = torch.empty(loaded.room(arguments), dtype=torch.uint8)
    loaded.attend_tiles(arguments, room.data_ptr(), room.shape[0])
    return out, lse


def _packed(x: Tensor | None) -> abi.Tensor:
    """(T, H, C)."""
    return tensor(x) if x is None else tensor(x, row=x.stride(0), head=x.stride(1))
