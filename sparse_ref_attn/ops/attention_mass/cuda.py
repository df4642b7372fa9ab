"""The LSE and the mass of csrc/attention_mass.cu, launched as `triton_mass` launches its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import abi
from .._cuda import DTYPES, launch, pointer, tensor
from .ragged import Ragged

__all__ = ["launch_lse", "launch_mass"]


def launch_lse(
    q: Tensor, k: Tensor, scale: float, query_stride: int, key_mask: Tensor | None = None, ragged: Ragged | None = None
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C) -> lse (B, H, N), of every `query_stride`-th query only; packed rows as B = 1."""
    batch, queries, heads, channels = q.shape
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    longest, items = (queries, batch) if ragged is None else (ragged.max_q, ragged.ref_starts.shape[0])
    if lse.numel() and items:
        arguments = abi.AttentionLseArgs(
            dtype=DTYPES[q.dtype],
            channels=channels,
            heads=heads,
            items=items,
            queries=longest,
            keys=k.shape[1],
            query_stride=query_stride,
            scale=scale,
            q=_rows(q),
            k=_rows(k),
            key_mask=_mask(key_mask),
            lse=_scores(lse),
            cu_seqlens_q=pointer(ragged and ragged.cu_seqlens_q),
            cu_seqlens_k=pointer(ragged and ragged.cu_seqlens_k),
        )
        launch("sra_attention_lse", arguments, q)
    return lse


def launch_mass(
    q: Tensor,
    k_ref: Tensor,
    lse: Tensor,
    scale: float,
    query_stride: int,
    key_mask: Tensor | None = None,
    ragged: Ragged | None = None,
    total_ref: int | None = None,
) -> Tensor:
    """q (B, N, H, C), k_ref (B, R, H, C), lse (B, H, N), key_mask (B, R) -> mass (B, H, R); packed rows as B = 1.

    With `ragged`, k_ref holds every packed key row and the result is (1, H, total_ref).
    """
    batch, queries, heads, channels = q.shape
    refs = k_ref.shape[1] if total_ref is None else total_ref
    mass = torch.empty(batch, heads, refs, dtype=torch.float32, device=q.device)
    longest, items = (refs, batch) if ragged is None else (ragged.max_ref, ragged.ref_starts.shape[0])
    if mass.numel() and items:
        arguments = abi.AttentionMassArgs(
            dtype=DTYPES[q.dtype],
            channels=channels,
            heads=heads,
            items=items,
            queries=queries,
            refs=longest,
            query_stride=query_stride,
            scale=scale,
            q=_rows(q),
            k=_rows(k_ref),
            key_mask=_mask(key_mask),
            lse=_scores(lse),
            mass=_scores(mass),
            cu_seqlens_q=pointer(ragged and ragged.cu_seqlens_q),
            cu_seqlens_ref=pointer(ragged and ragged.cu_seqlens_ref),
            ref_starts=pointer(ragged and ragged.ref_starts),
        )
        launch("sra_attention_mass", arguments, q)
    return mass


def _rows(x: Tensor) -> abi.Tensor:
    """(B, N, H, C)."""
    return tensor(x, *x.stride()[:3])


def _scores(x: Tensor) -> abi.Tensor:
    """(B, H, N)."""
    return tensor(x, item=x.stride(0), row=x.stride(2), head=x.stride(1))


def _mask(x: Tensor | None) -> abi.Tensor:
    """(B, N)."""
    return tensor(x) if x is None else tensor(x, item=x.stride(0), row=x.stride(1))
