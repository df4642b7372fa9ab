"""Each tile of generation tokens with reference keys of its own, in plain PyTorch: a bias stands for the choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tests.adapters.witnesses import Attends, Attention


def squares(grids: list[tuple[int, int]], side: int) -> Tensor:
    """The square of side x side of each token of some grids, counted on from grid to grid."""
    found: list[int] = []
    for height, width in grids:
        first = max(found, default=-1) + 1
        found += [first + y // side * -(-width // side) + x // side for y in range(height) for x in range(width)]
    return torch.tensor(found)


def of_keys(mask: Tensor, batch: int) -> Tensor:
    """A mask of keys as (B, S) bool."""
    keys = mask[(None,) * (4 - mask.ndim)][:, 0, 0]
    return (keys if keys.dtype == torch.bool else keys == 0).expand(batch, -1)


@dataclass
class ByTile:
    """What is read, as a user would say it.

    Attributes
    ----------
    text : int
    grid : (int, int)
        Of the generation.
    references : list of (int, int)
        Their grids.
    counts : tuple of int
        Tokens of each reference, or of all together where it is one number for several.
    tile : int
    cell : int, optional
        None for no means.
    weights : tuple of float, optional
        Of references that compete.
    weighted : bool
        Whether means are by the attention that all generation rows pay.
    """

    text: int
    grid: tuple[int, int]
    references: list[tuple[int, int]]
    counts: tuple[int, ...]
    tile: int = 4
    cell: int | None = 4
    weights: tuple[float, ...] | None = None
    weighted: bool = False

    @property
    def own(self) -> int:
        return self.text + self.grid[0] * self.grid[1]

    @property
    def sizes(self) -> list[int]:
        return [height * width for height, width in self.references]

    def seen(self, old: Attention) -> Tensor:
        """Reference tokens that the mask allows, (B, R)."""
        batch = old.q.shape[0]
        if old.mask is None:
            return torch.ones(batch, sum(self.sizes)).bool()
        return of_keys(old.mask, batch)[:, self.own :]

    def mass(self, old: Attention) -> Tensor:
        """Summed attention of the text's tile and of each other, (B, 1 + tiles, R), the heads' mean."""
        weights = old.weights()[:, :, self.text : self.own, self.own :].mean(1)
        tiles = one_hot(squares([self.grid], self.tile)).double()
        by_tile = torch.einsum("bnr,nt->btr", weights, tiles)
        return torch.cat([by_tile.sum(1, keepdim=True), by_tile], 1)

    def chosen(self, old: Attention) -> Tensor:
        """Which reference tokens each own row reads, (B, own, R)."""
        mass, seen = self.mass(old), self.seen(old)
        if self.weights is not None:
            factors = [torch.full((size,), w) for size, w in zip(self.sizes, self.weights, strict=True)]
            mass = mass * torch.cat(factors).double()
        mass = mass.masked_fill(~seen[:, None], -1.0)
        parts = mass.split(self.sizes, -1) if len(self.counts) == len(self.sizes) else (mass,)
        read = []
        for part, count in zip(parts, self.counts, strict=True):
            best = part.topk(count, -1).indices
            read.append(torch.zeros(part.shape).bool().scatter_(-1, best, True))
        chosen = torch.cat(read, -1) & seen[:, None]
        rows = torch.cat([torch.zeros(self.text).long(), 1 + squares([self.grid], self.tile)])
        return chosen[:, rows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, old: Attention) -> Tensor:
        """Attention of the own rows, heads first, all in float64; `old` is what the last full step had."""
        read, seen = self.chosen(old), self.seen(old)
        batch = q.shape[0]
        old_k, old_v = (x[:, self.own :].double().transpose(1, 2) for x in (old.k, old.v))
        bias = [
            torch.zeros(batch, self.own, self.own).double(),
            torch.zeros(read.shape).double().masked_fill(~read, -math.inf),
        ]
        if mask is not None:
            bias[0] = bias[0].masked_fill(~of_keys(mask, batch)[:, None, : self.own], -math.inf)
        keys, values = [k[:, :, : self.own].double(), old_k], [v[:, :, : self.own].double(), old_v]
        if self.cell is not None:
            cells = one_hot(squares(self.references, self.cell)).double() * seen[..., None]  # (B, R, cells)
            by = cells * self.mass(old)[:, 0, :, None] if self.weighted else cells
            share = by / by.sum(1, keepdim=True).clamp_min(1e-30)
            keys.append(torch.einsum("brm,bhrc->bhmc", share, old_k))
            values.append(torch.einsum("brm,bhrc->bhmc", share, old_v))
            bias.append(((~read).double() @ cells).log())
        scores = q[:, :, : self.own].double() @ torch.cat(keys, 2).mT * q.shape[-1] ** -0.5
        weights = (scores + torch.cat(bias, -1)[:, None]).softmax(-1)
        return (weights @ torch.cat(values, 2)).to(q.dtype)


class TilesOf(Attends):
    """Inside, the text and generation rows of each attention read what `by` says of an earlier one's, in turn."""

    def __init__(self, by: ByTile, earlier: list[Attention]) -> None:
        self.by, self.layers = by, iter(earlier)

    def attend(self, given: dict[str, Any]) -> Tensor:
        out = self.ask(**given)
        q, k, v = (given[name] for name in ("query", "key", "value"))
        out[:, :, : self.by.own] = self.by.attend(q, k, v, given.get("attn_mask"), next(self.layers))
        return out
