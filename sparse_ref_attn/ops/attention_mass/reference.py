"""The definition: softmax over all keys, columns of the span, mean over the queries."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_mass_reference"]


def attention_mass_reference(
    q: Tensor, k: Tensor, span: tuple[int, int], scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C), key_mask (B, S) bool -> (B, H, R), in the precision of q."""
    scores = torch.einsum("bnhc,bshc->bhns", q, k) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1)[..., span[0] : span[1]].mean(dim=2)
