"""The definition: softmax over all keys, columns of the span, mean over the queries.

A query that may attend to no key gives nothing, and no queries give zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_mass_reference"]


def attention_mass_reference(
    q: Tensor,
    k: Tensor,
    span: tuple[int, int],
    scale: float,
    key_mask: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C), key_mask (B, S) bool, lse (B, H, N) -> (B, H, R), in the precision of q."""
    start, stop = span
    scores = torch.einsum("bnhc,bshc->bhns", q, k) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    if lse is None:
        weights = scores.softmax(dim=-1)[..., start:stop]
        if key_mask is not None:
            weights = weights.masked_fill(~key_mask.any(dim=1)[:, None, None, None], 0.0)
    else:
        pivot = lse.masked_fill(lse == float("-inf"), float("inf"))[..., None].to(scores.dtype)
        weights = (scores[..., start:stop] - pivot).exp()
    return weights.mean(dim=2) if q.shape[1] else weights.sum(dim=2)
