"""The mass when the LSE is at hand: only the reference's columns are computed, one head and one chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_mass_from_lse"]

CHUNK_BYTES = 128 << 20
CPU_CHUNK_BYTES = 4 << 20  # stays in cache between the product and the sum


def attention_mass_from_lse(
    q: Tensor, k_ref: Tensor, lse: Tensor, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """q (B, N, H, C), k_ref (B, R, H, C), lse (B, H, N), key_mask (B, R) bool -> (B, H, R) float32."""
    batch, queries, heads, _ = q.shape
    refs = k_ref.shape[1]
    budget = CPU_CHUNK_BYTES if q.device.type == "cpu" else CHUNK_BYTES
    together = 1 if q.device.type == "cpu" else max(1, min(heads, budget // (4 * refs * min(queries, 256))))
    rows = max(1, min(queries, budget // (4 * refs * together)))
    pivot = lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]  # a query without keys
    mass = q.new_zeros(batch, heads, refs, dtype=torch.float32)
    for item in range(batch):
        for head in range(0, heads, together):
            group = slice(head, min(head + together, heads))
            q_group = q[item, :, group].transpose(0, 1).float() * scale
            k_group = k_ref[item, :, group].permute(1, 2, 0).float()
            for first in range(0, queries, rows):
                some = slice(first, first + rows)
                scores = q_group[:, some] @ k_group
                mass[item, group] += scores.sub_(pivot[item, group, some]).exp_().sum(dim=1)
    if key_mask is not None:
        mass.masked_fill_(~key_mask[:, None, :], 0.0)
    return mass / queries
