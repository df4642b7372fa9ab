"""The same in chunks of queries: any device, float32 throughout, memory bounded by the chunk.

A chunk of scores goes through matrix product, exponential and column sums before the next is made, in one buffer. On a
CPU it is one head and a few megabytes, so that it stays in cache in between; elsewhere it is as many heads as
`CHUNK_BYTES` holds, so that launches are few.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_mass_chunked"]

CHUNK_BYTES = 128 << 20
CPU_CHUNK_BYTES = 8 << 20
SAFE = 60.0
"""exp(-60) to exp(60), summed over up to 10^12 keys, are normal float32 numbers: no maximum need be subtracted."""


def attention_mass_chunked(
    q: Tensor, k: Tensor, span: tuple[int, int], scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C), key_mask (B, S) bool -> (B, H, R) float32."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    cpu = q.device.type == "cpu"
    together = 1 if cpu else max(1, min(heads, CHUNK_BYTES // (4 * keys * min(queries, 256))))
    rows = max(1, min(queries, (CPU_CHUNK_BYTES if cpu else CHUNK_BYTES) // (4 * keys * together)))
    buffer = q.new_empty(together * rows * keys, dtype=torch.float32)
    mass = q.new_zeros(batch, heads, span[1] - span[0], dtype=torch.float32)
    for item in range(batch):
        dropped = None if key_mask is None else ~key_mask[item]
        for head in range(0, heads, together):
            group = slice(head, min(head + together, heads))
            q_group = q[item, :, group].transpose(0, 1).float() * scale
            k_group = k[item, :, group].permute(1, 2, 0).float()
            bounded = cpu and bool(q_group.norm(dim=2).max() * k_group.square().sum(1).max().sqrt() <= SAFE)
            for chunk in q_group.split(rows, dim=1):
                shape = (*chunk.shape[:2], keys)
                scores = buffer[: shape[0] * shape[1] * keys].view(shape)
                torch.bmm(chunk, k_group, out=scores)
                if dropped is not None:
                    scores.masked_fill_(dropped, float("-inf"))
                if not bounded:
                    scores.sub_(scores.amax(dim=-1, keepdim=True))
                scores.exp_()
                weights = scores.sum(dim=-1).reciprocal_()
                mass[item, group] += torch.bmm(weights[:, None], scores[..., span[0] : span[1]])[:, 0]
    return mass / queries
