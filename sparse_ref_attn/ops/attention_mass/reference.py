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
    lse = scores.logsumexp(dim=-1) if lse is None else lse.to(scores.dtype)
    pivot = lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]
    return (scores[..., start:stop] - pivot).exp().sum(dim=2) / max(q.shape[1], 1)
