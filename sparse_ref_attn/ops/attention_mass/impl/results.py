"""What the kernels write into, and how many programs that takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ragged import Ragged

__all__ = ["empty_lse", "empty_mass"]


def empty_lse(q: Tensor, ragged: Ragged | None) -> tuple[Tensor, int, int]:
    """(B, H, N) for q (B, N, H, C), the longest item's queries, and the number of items."""
    batch, queries, heads, _ = q.shape
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    return (lse, queries, batch) if ragged is None else (lse, ragged.max_q, ragged.ref_starts.shape[0])


def empty_mass(q: Tensor, k_ref: Tensor, ragged: Ragged | None, total_ref: int | None) -> tuple[Tensor, int, int]:
    """(B, H, R) for k_ref (B, R, H, C), or (B, H, total_ref), the longest item's references, and the items."""
    batch, _, heads, _ = q.shape
    refs = k_ref.shape[1] if total_ref is None else total_ref
    mass = torch.empty(batch, heads, refs, dtype=torch.float32, device=q.device)
    return (mass, refs, batch) if ragged is None else (mass, ragged.max_ref, ragged.ref_starts.shape[0])
