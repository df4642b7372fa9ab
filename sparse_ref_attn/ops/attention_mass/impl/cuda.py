"""The LSE and the mass of csrc/attention_mass.cu, launched as `triton_mass` launches its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....kernels import abi
from ...shared.cuda_launch import DTYPES, launch, pointer, tensor
from ..ragged import Ragged
from .results import empty_lse, empty_mass

__all__ = ["launch_lse", "launch_mass"]


def launch_lse(
    q: Tensor, k: Tensor, scale: float, query_stride: int, key_mask: Tensor | None = None, ragged: Ragged | None = None
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C) -> lse (B, H, N), of every `query_stride`-th query only; packed rows as B = 1."""
    lse, longest, items = empty_lse(q, ragged)
    if lse.numel() and items:
        arguments = abi.AttentionLseArgs(
            **_both(q, k, lse, scale, query_stride, key_mask, ragged, items),
            queries=longest,
            keys=k.shape[1],
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
    mass, longest, items = empty_mass(q, k_ref, ragged, total_ref)
    if mass.numel() and items:
        arguments = abi.AttentionMassArgs(
            **_both(q, k_ref, lse, scale, query_stride, key_mask, ragged, items),
            queries=q.shape[1],
            refs=longest,
            mass=_scores(mass),
            cu_seqlens_ref=pointer(ragged and ragged.cu_seqlens_ref),
            ref_starts=pointer(ragged and ragged.ref_starts),
        )
        launch("sra_attention_mass", arguments, q)
    return mass


def _both(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    query_stride: int,
    key_mask: Tensor | None,
    ragged: Ragged | None,
    items: int,
) -> dict[str, Any]:
    """The arguments that both functions take."""
    return {
        "dtype": DTYPES[q.dtype],
        "channels": q.shape[3],
        "heads": q.shape[2],
        "items": items,
        "query_stride": query_stride,
        "scale": scale,
        "q": _rows(q),
        "k": _rows(k),
        "key_mask": _mask(key_mask),
        "lse": _scores(lse),
        "cu_seqlens_q": pointer(ragged and ragged.cu_seqlens_q),
    }


def _rows(x: Tensor) -> abi.Tensor:
    """(B, N, H, C)."""
    return tensor(x, *x.stride()[:3])


def _scores(x: Tensor) -> abi.Tensor:
    """(B, H, N)."""
    return tensor(x, item=x.stride(0), row=x.stride(2), head=x.stride(1))


def _mask(x: Tensor | None) -> abi.Tensor:
    """(B, N)."""
    return tensor(x) if x is None else tensor(x, item=x.stride(0), row=x.stride(1))
