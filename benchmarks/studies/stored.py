"""A run that stores its references' K/V at some steps and reads them, or a part of them, at the others.

Masks and biases stand in for a gather: what is read is exact, the time that it takes is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_ref_attn.adapters.base import Adapter
from sparse_ref_attn.cost import Flops, ModelShape, StepTokens, run_flops, scoring_flops
from sparse_ref_attn.hooks.diffusers import Attention, routed_attention
from sparse_ref_attn.types import TokenLayout

__all__ = ["Reading", "StoredRun", "stored", "work"]


@dataclass(frozen=True)
class Reading:
    """When reference rows run, and what is read of their stored K/V in between.

    Parameters
    ----------
    at : tuple of int
        Steps with reference rows, 0 first; the others run text and generation rows alone.
    per : {"all", "run", "layer", "tile"}
        Everything is read, or the best tokens of one ranking: of all layers, of each layer, or of each layer and tile
        of generation tokens (text queries then have their layer's). Rankings are by attention mass.
    share : float
        Of the reference tokens, read by each query; 1 with "all".
    tile : int
        Side of a tile, in generation tokens.
    cell : int
        Side of the cells of reference tokens whose mean key and value stand for what is not read; 0 for none.
    full : {"all", "kept", "rolling"}
        Rows that run at the steps `at` after the first: all, the share `part` that the first step ranks best, or a
        share `part` by turns. The rest is read as it was stored.
    part : float
    steps : int, optional
        Denoising steps; None for the generator's own.

    Examples
    --------
    >>> Reading((0, 2), "tile", 0.125, cell=4, steps=6).name, Reading((0, 1, 2), steps=3).name
    ('tile 4x4 + means 4x4 at 0 2 of 6', 'dense, 3 steps')
    """

    at: tuple[int, ...]
    per: Literal["all", "run", "layer", "tile"] = "all"
    share: float = 1.0
    tile: int = 4
    cell: int = 0
    full: Literal["all", "kept", "rolling"] = "all"
    part: float = 0.25
    steps: int | None = None

    @property
    def name(self) -> str:
        """All but the share that is read."""
        if self.full == "all" and self.at == tuple(range(self.steps or 0)):
            return f"dense, {self.steps} steps"
        read = f"tile {self.tile}x{self.tile}" if self.per == "tile" else self.per
        means = f" + means {self.cell}x{self.cell}" if self.cell else ""
        rows = "" if self.full == "all" else f", {self.full} {self.part:.0%}"
        steps = f" of {self.steps}" if self.steps else ""
        return f"{read}{means} at {' '.join(map(str, self.at))}{steps}{rows}"

    def tokens(self, text: int, generation: int, references: int, steps: int) -> list[StepTokens]:
        """Rows and stored keys of each step, of the generator's `steps` if the reading has none of its own."""
        part = round(self.part * references)
        read = round(self.share * references) + (references // self.cell**2 if self.cell else 0)
        found = []
        for step in range(self.steps or steps):
            if step not in self.at:
                found.append(StepTokens(text, generation, 0, cached=read))
            elif step == self.at[0] or self.full == "all":
                found.append(StepTokens(text, generation, references))
            else:
                found.append(StepTokens(text, generation, part, cached=references - part))
        return found


def work(shape: ModelShape, reading: Reading, text: int, generation: int, references: int, steps: int) -> Flops:
    """FLOPs of a run; every step with reference rows whose mass is asked for is charged one product with their keys.

    Examples
    --------
    >>> one = ModelShape("one", image=10, text=10, joint=0, item=5, output=2, attention_layers=1, heads=1, head_dim=4,
    ...     parameter_bytes=0, dtype_bytes=2)
    >>> [work(one, Reading((0,), per, 0.5), 1, 2, 2, 2).attention for per in ("all", "layer")]
    [592, 624]
    """
    measured = len(reading.at) if reading.per != "all" else int(reading.full == "kept")
    scoring = measured * scoring_flops(shape, generation, references, shape.attention_layers)
    return run_flops(shape, reading.tokens(text, generation, references, steps), scoring=scoring)


@contextmanager
def stored(transformer: nn.Module, adapter: Adapter, reading: Reading, run: StoredRun | None = None) -> Iterator[None]:
    """Inside, one run of a pipeline goes as `reading` says; calls are counted from 0."""
    run = run or StoredRun(adapter, reading)
    hook = transformer.register_forward_pre_hook(run.before, with_kwargs=True)
    try:
        with routed_attention(adapter.sites(transformer), run.attend):
            yield
    finally:
        hook.remove()


@dataclass
class StoredRun:
    """What a run has stored: K and V (1, R, H, C) and, where ranked, mass (tiles, R) of each layer."""

    adapter: Adapter
    reading: Reading
    step: int = -1
    layout: TokenLayout | None = None
    rows: Tensor | None = None  # reference rows that run; None for all
    reads: bool = False  # a step without reference rows
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)
    biases: dict[int, Tensor] = field(default_factory=dict)
    best: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.step += 1
        kwargs = self.adapter.bind(module, args, kwargs)
        if self.layout is None:
            found = self.adapter.find(kwargs)
            assert found is not None
            self.layout = self.adapter.layout(kwargs, found)
        self.reads = self.step not in self.reading.at
        if self.reads:
            return (), self.adapter.drop(kwargs, self.layout, torch.arange(self.generation))
        self.rows = self._rows()
        self.biases.clear()
        if self.rows is None:
            return (), kwargs
        rows = torch.cat([torch.arange(self.generation), self.generation + self.rows])
        return (), self.adapter.drop(kwargs, self.layout, rows)

    @property
    def generation(self) -> int:
        assert self.layout is not None
        return self.layout.generation[1]

    @property
    def own(self) -> int:
        """Rows of text and generation, which come first."""
        assert self.layout is not None
        return self.layout.text + self.generation

    def _rows(self) -> Tensor | None:
        assert self.layout is not None
        turn, references, part = self.reading.at.index(self.step), self.layout.reference_tokens, self.reading.part
        if self.reading.full == "all" or turn == 0:
            return None
        if self.reading.full == "rolling":
            return torch.arange(references)[turn % round(1 / part) :: round(1 / part)]
        if self.best is None:
            mass = torch.stack([each.sum(0) for each in self.mass.values()]).sum(0)
            self.best = mass.topk(round(part * references)).indices.sort().values
        return self.best

    def attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
        if self.reads:
            return self.read(i, q, k, v, own)
        if self.rows is None:
            self.keys[i], self.values[i] = k[:, self.own :].clone(), v[:, self.own :].clone()
        else:
            self.keys[i][:, self.rows], self.values[i][:, self.rows] = k[:, self.own :], v[:, self.own :]
            k, v = self._beside(k[:, : self.own], self.keys[i]), self._beside(v[:, : self.own], self.values[i])
        if self.reading.per != "all" or (self.reading.full == "kept" and self.rows is None):
            self.mass[i] = self._mass(q, k)
        return own() if self.rows is None else own(k, v)

    @staticmethod
    def _beside(own: Tensor, *others: Tensor) -> Tensor:
        return torch.cat([own, *others], 1)

    def _mass(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention that each tile gives each reference token, the heads' mean."""
        assert self.layout is not None
        q = q[:, self.layout.text : self.own]
        weights = torch.einsum("bqhc,bkhc->bhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        weights = weights[0, :, :, self.own :].mean(0)
        tiles = self._tiles()
        return weights.new_zeros(int(tiles.max()) + 1, weights.shape[1]).index_add_(0, tiles, weights)

    def _tiles(self) -> Tensor:
        """The tile of each generation token."""
        if self.reading.per != "tile":
            return torch.zeros(self.generation, dtype=torch.long)
        side = math.isqrt(self.generation)
        return _cells([(side, side)], self.reading.tile)

    def read(self, i: int, q: Tensor, k: Tensor, v: Tensor, own: Attention) -> Tensor:
        if self.reading.per == "all":
            return own(self._beside(k, self.keys[i]), self._beside(v, self.values[i]))
        means = self._means()
        k = self._beside(k, self.keys[i], *_mean(means, self.keys[i]))
        v = self._beside(v, self.values[i], *_mean(means, self.values[i]))
        if i not in self.biases:
            self.biases[i] = self._bias(i, means)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.biases[i]).transpose(1, 2)

    def _bias(self, i: int, means: Tensor | None) -> Tensor:
        """(own rows, own rows + R + cells): 0 where a query reads, log of the number that a mean stands for."""
        read = self._chosen(i)
        parts = [torch.zeros(len(read), len(read)), torch.zeros(read.shape).masked_fill(~read, -math.inf)]
        if means is not None:
            parts.append(((~read).float() @ means.T).log())
        return torch.cat(parts, 1)

    def _chosen(self, i: int) -> Tensor:
        """Which reference tokens each text and generation query reads, (own rows, R) bool."""
        return self.chosen(i)[self.groups()]

    def groups(self) -> Tensor:
        """Which row of `chosen` is each text and generation query's, (own rows,)."""
        assert self.layout is not None
        return torch.cat([torch.zeros(self.layout.text, dtype=torch.long), 1 + self._tiles()])

    def chosen(self, i: int) -> Tensor:
        """Which reference tokens the text, and then each tile, read in a layer, (1 + tiles, R) bool."""
        mass = self.mass[i] if self.reading.per != "run" else torch.stack(list(self.mass.values())).sum(0)
        ranked = torch.cat([mass.sum(0, keepdim=True), mass])
        best = ranked.topk(round(self.reading.share * mass.shape[1]), -1).indices
        return torch.zeros(ranked.shape, dtype=torch.bool).scatter_(1, best, True)

    def _means(self) -> Tensor | None:
        """(cells, R): 1 where a token is of a cell."""
        assert self.layout is not None
        if not self.reading.cell:
            return None
        grids = [r.grid for r in self.layout.references]
        return functional.one_hot(_cells(grids, self.reading.cell)).T.float()  # type: ignore[arg-type]


def _mean(cells: Tensor | None, x: Tensor) -> list[Tensor]:
    """Of K or V (1, R, H, C), the mean of each cell, (1, cells, H, C)."""
    if cells is None:
        return []
    return [torch.einsum("mr,brhc->bmhc", cells / cells.sum(1, keepdim=True), x)]


def _cells(grids: Sequence[tuple[int, int]], side: int) -> Tensor:
    """The cell of side x side of each token of some grids, in reading order, counted on from grid to grid."""
    found, count = [], 0
    for height, width in grids:
        across = -(-width // side)
        y, x = torch.arange(height) // side, torch.arange(width) // side
        found.append((count + y[:, None] * across + x).flatten())
        count += -(-height // side) * across
    return torch.cat(found)
