"""The same in chunks of queries: any device, float32 throughout, memory bounded by the chunk.

A chunk of scores goes through matrix product, exponential and column sums before the next is made, in one buffer. On a
CPU it is one head and a few megabytes, so that it stays in cache in between; elsewhere it is as many heads as
`CHUNK_BYTES` holds, so that launches are few. With the LSE at hand only the span's keys are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .tiling import chunks_of, mean_of, sum_tiles, weigh_tiles

__all__ = ["attention_mass_chunked"]

CHUNK_BYTES = 128 << 20
CPU_CHUNK_BYTES = 16 << 20
LOG2E = math.log2(math.e)
SAFE = 86.0
"""2^-86 to 2^86, summed over up to 10^12 keys, are normal float32 numbers: no maximum need be subtracted."""


def attention_mass_chunked(
    q: Tensor,
    k: Tensor,
    span: tuple[int, int],
    scale: float,
    key_mask: Tensor | None = None,
    lse: Tensor | None = None,
    tiles: Sequence[int] | None = None,
    reduce_heads: bool = False,
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C), key_mask (B, S) bool, lse (B, H, N) -> (B, H, R) float32.

    With the T + 1 offsets of `tiles`, (B, H, T, R). With `reduce_heads` without H, the mean over the heads.
    """
    batch, queries, heads, _ = q.shape
    columns = slice(*span)
    cut = (0, queries) if tiles is None else tiles
    kept = 1 if reduce_heads else heads
    mass = q.new_zeros(batch, kept, len(cut) - 1, columns.stop - columns.start, dtype=torch.float32)
    if q.numel():
        _add_masses(mass, q, k, columns, scale, key_mask, lse, cut)
        mean_of(mass, cut, heads // kept)
    mass = mass[:, :, 0] if tiles is None else mass
    return mass[:, 0] if reduce_heads else mass


def _add_masses(
    mass: Tensor,
    q: Tensor,
    k: Tensor,
    columns: slice,
    scale: float,
    key_mask: Tensor | None,
    lse: Tensor | None,
    tiles: Sequence[int],
) -> None:
    """Add to mass (B, H or 1, T, R) the sums over each tile's queries."""
    queries, heads = q.shape[1:3]
    pivot = None
    if lse is not None:
        pivot = lse.masked_fill(lse == float("-inf"), float("inf"))[..., None] * LOG2E  # inf: a query without keys
        k, key_mask = k[:, columns], None if key_mask is None else key_mask[:, columns]
        columns = slice(None)
    keys = k.shape[1]
    cpu = q.device.type == "cpu"
    together = 1 if cpu else max(1, min(heads, CHUNK_BYTES // (4 * keys * min(queries, 256))))
    rows = max(1, min(queries, (CPU_CHUNK_BYTES if cpu else CHUNK_BYTES) // (4 * keys * together)))
    buffer = q.new_empty(together * rows * keys, dtype=torch.float32)
    chunks = list(chunks_of(tiles, rows))
    for item in range(q.shape[0]):
        bias = None if key_mask is None else buffer.new_zeros(keys).masked_fill_(~key_mask[item], float("-inf"))
        for head in range(0, heads, together):
            group = slice(head, min(head + together, heads))
            q_group = q[item, :, group].transpose(0, 1).float() * (scale * LOG2E)  # exp2 costs a third of exp
            k_group = k[item, :, group].permute(1, 2, 0).float()
            bounded = cpu and bool(q_group.norm(dim=2).max() * k_group.square().sum(1).max().sqrt() <= SAFE)
            out = mass[item] if mass.shape[1] == 1 else mass[item, group]
            for some, runs in chunks:
                chunk = q_group[:, some]
                shape = (*chunk.shape[:2], keys)
                scores = buffer[: shape[0] * shape[1] * keys].view(shape)
                torch.bmm(chunk, k_group, out=scores)
                if bias is not None:
                    scores.add_(bias)
                if pivot is not None:
                    sum_tiles(scores.sub_(pivot[item, group, some]).exp2_(), runs, out)
                    continue
                if not bounded:
                    scores.sub_(scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min))
                total = scores.exp2_().sum(dim=-1)
                weights = torch.where(total == 0, 0.0, total.reciprocal())
                weigh_tiles(weights, scores[..., columns], runs, out)
