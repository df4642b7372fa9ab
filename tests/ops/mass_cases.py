"""What the mass and LSE kernels are given, and what is true of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ref_attn.ops.attention_mass.ragged import Ragged
from sparse_ref_attn.ops.attention_mass.reference import attention_mass_reference

from .guards import in_nan
from .tolerance import assert_as_accurate


def draw(
    queries: int, keys: int, heads: int = 2, C: int = 64, dtype: torch.dtype = torch.float16, batch: int = 1
) -> tuple[Tensor, Tensor]:
    """q (B, N, H, C), k (B, S, H, C) with NaN around every row."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    q, k = (2 * torch.randn(batch, n, heads, C, generator=generator) for n in (queries, keys))
    return in_nan(q.to(dtype), gap=16), in_nan(k.to(dtype), gap=16)


def lse_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (torch.einsum("bnhc,bshc->bhns", q, k) * scale).logsumexp(-1)


class RaggedBatch:
    """Items of (queries, keys, references), the references the last of each item's keys; at most all of them."""

    def __init__(self, items: Sequence[tuple[int, int, int]]) -> None:
        self.items = [(n, s, min(r, s)) for n, s, r in items]
        counts = torch.tensor(self.items, dtype=torch.int32)
        self.offsets = torch.zeros(3, len(items) + 1, dtype=torch.int32)
        self.offsets[:, 1:] = counts.t().cumsum(1)
        self.starts = (self.offsets[1, 1:] - counts[:, 2]).to(torch.int32)
        self.rows, self.keys, self.refs = self.offsets[:, -1].tolist()
        queries, _, refs = counts.max(0).values.tolist()
        self.ragged = Ragged(self.offsets[0], self.offsets[1], self.offsets[2], self.starts, queries, refs)

    def check(self, mass: Tensor, q: Tensor, k: Tensor, scale: float, stride: int) -> None:
        """Each item's part of mass (1, H, references) is what the item gives alone."""
        for item, (n, s, r) in enumerate(self.items):
            first_q, first_k, first = self.offsets[:, item].tolist()
            mine = mass[:, :, first : first + r]
            if n == 0 or r == 0:
                assert (mine == 0).all()
                continue
            alone_q, alone_k = q[:, first_q : first_q + n : stride], k[:, first_k : first_k + s]
            truth = attention_mass_reference(alone_q.double(), alone_k.double(), (s - r, s), scale)
            assert_as_accurate(mine, truth, attention_mass_reference(alone_q, alone_k, (s - r, s), scale))
