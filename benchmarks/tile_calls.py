"""The call that `bench_ops` times for selections of query tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_ref_attn.functional import HostOffsets, gather_attention

from .op_calls import GATED, Attention

__all__ = ["CELL", "Tiled"]

CELL = 4  # tokens a side of what one mean stands for


class Tiled:
    """Text is one tile, the generation tiles of side x side tokens; each keeps random rows, and a mean of each cell.

    As many rows as `call` keeps. Cells and tiles are stretches of tokens here: only their numbers matter.
    """

    def __init__(self, call: Attention, side: int) -> None:
        self.shape, self.device, self.kept = call.shape, call.device, call.kept
        self.op = f"gather_attention, tiles {side} x {side}"
        self.call = call.dense()
        generator = torch.Generator().manual_seed(1)
        edges = [0, *range(self.shape.text, self.shape.queries + 1, side * side)]
        tiles, bank = len(edges) - 1, self.shape.bank
        chosen = torch.stack([torch.randperm(bank, generator=generator)[: self.kept] for _ in range(tiles)])
        read = torch.zeros(tiles, bank).scatter_(1, chosen, 1.0)
        self.q, self.k, self.v, self.k_ref, self.v_ref = (x.detach() for x in call.leaves)
        self.k2, self.v2 = (x.unflatten(0, (-1, CELL * CELL)).mean(1)[None] for x in (self.k_ref, self.v_ref))
        self.cu_tiles, self.host = torch.tensor(edges, dtype=torch.int32).to(self.device), HostOffsets(tiles=edges)
        self.bias = (CELL * CELL - read.unflatten(1, (-1, CELL * CELL)).sum(-1)).log().to(self.device)
        self.chosen, self.read = chosen.int().to(self.device), read.bool().to(self.device)

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return self.shape.flops(self.kept + self.bias.shape[1])

    def ours(self, backend: str) -> Tensor:
        """This library, (1, N, H, C)."""
        return gather_attention(
            self.q, self.k, self.v, self.k_ref, self.v_ref, self.chosen, k2=self.k2, v2=self.v2,
            cu_tiles=self.cu_tiles, bias=self.bias, host=self.host, backend=backend,
        )  # fmt: skip

    def by_hand(self) -> Tensor:
        """PyTorch's attention over all keys, under a mask that says what each tile reads."""
        k, v = (x.transpose(1, 2) for x in self._joined())
        return scaled_dot_product_attention(self.q.transpose(1, 2), k, v, self._mask(slice(None))).transpose(1, 2)

    def plain(self) -> Tensor:
        """The formula in the operands' precision, for the last queries: text comes first, and is one tile."""
        return self._formula(self.q, *self._joined())

    def error(self, out: Tensor) -> float:
        """Distance of the last queries from float64."""
        truth = self._formula(self.q.double(), *(x.double() for x in self._joined()))
        return float((out[:, -GATED:].double() - truth).abs().max())

    def _formula(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q[:, -GATED:], k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self._mask(slice(-GATED, None)).to(q.dtype)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Keys and values (1, ., H, C): the dense ones, the means, all of the bank."""
        k = torch.cat([self.k, self.k2, self.k_ref[None]], 1)
        return k, torch.cat([self.v, self.v2, self.v_ref[None]], 1)

    def _mask(self, queries: slice) -> Tensor:
        """What is added to the scores of those queries with the joined keys."""
        own = self.bias.new_zeros(self.bias.shape[0], self.shape.queries)
        unread = torch.where(self.read, 0.0, -math.inf)
        lengths = self.cu_tiles.diff().long()
        tile = torch.repeat_interleave(torch.arange(lengths.shape[0], device=self.device), lengths)[queries]
        return torch.cat([own, self.bias, unread], 1).to(self.q.dtype)[tile]
