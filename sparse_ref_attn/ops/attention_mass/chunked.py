"""The same in chunks of queries: any device, float32 accumulation, memory bounded by `CHUNK_BYTES`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_mass_chunked"]

CHUNK_BYTES = 128 << 20


def attention_mass_chunked(
    q: Tensor, k: Tensor, span: tuple[int, int], scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C), key_mask (B, S) bool -> (B, H, R) float32."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    start, stop = span
    chunk = max(1, min(queries, CHUNK_BYTES // (4 * batch * heads * keys)))
    k_t = k.permute(0, 2, 3, 1).float()
    q_t = q.permute(0, 2, 1, 3)
    bias = None if key_mask is None else torch.zeros_like(key_mask, dtype=torch.float32)
    if bias is not None and key_mask is not None:
        bias = bias.masked_fill(~key_mask, float("-inf"))[:, None, None, :]
    total = q.new_zeros(batch, heads, stop - start, dtype=torch.float32)
    for first in range(0, queries, chunk):
        scores = (q_t[:, :, first : first + chunk].float() * scale) @ k_t
        if bias is not None:
            scores += bias
        lse = scores.logsumexp(dim=-1, keepdim=True)
        total += (scores[..., start:stop] - lse).exp_().sum(dim=2)
    return total / queries
