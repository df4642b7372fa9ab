"""What stands for the reference tokens that a tile does not read: means of cells, and what could be better."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ref_attn.cost import StepTokens, run_flops, scoring_flops, step_flops
from sparse_ref_attn.hooks.diffusers import Attention
from sparse_ref_attn.toy.words import LENGTH

from .cases import Answer, Case, dense
from .generator import TOKENS, Generator, Run
from .points import WAYS, Points, Seen, Way
from .questions import Question
from .reading import ALIGNED, THIRDS
from .stored import Reading, StoredRun, stored

__all__ = ["FINALISTS", "FIRST", "SHARES", "cases"]

SHARES = (1 / 8,)
FIRST = (4, 1)
"""Subjects and seeds of what is not compared at length."""
FINALISTS = ("means 4x4", "means 4x4 by attention", "means 4x4, half by attention")

SLOW = ("second order of what each tile does not read",)
"""Looked at once: it holds a matrix for each tile, square and head."""


class PointsRun(StoredRun):
    """A `StoredRun` whose queries see the rest through points."""

    def __init__(self, generator: Generator, reading: Reading, way: Way) -> None:
        super().__init__(generator.adapter, reading)
        self.turn, self.way = _turns(generator), way
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.points: dict[int, Points] = {}

    def attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
        if not self.reads:
            self.points.pop(i, None)
            q_own = q[0, : self.own]
            scores = torch.einsum("nhc,khc->hnk", q_own, k[0]) * q.shape[-1] ** -0.5
            self.seen[i] = q_own, scores.logsumexp(-1)
        return super().attend(i, q, k, v, mask, own)

    def read(self, i: int, q: Tensor, k: Tensor, v: Tensor, own: Attention) -> Tensor:
        groups, read = self.groups(), self.chosen(i)
        if i not in self.points:
            self.points[i] = self.way.make(self._seen(i, groups, read))
        points, q = self.points[i], q[0]
        scale = q.shape[-1] ** -0.5
        keys, values = self._beside(k, self.keys[i])[0], self._beside(v, self.values[i])[0]
        scores = torch.einsum("nhc,khc->hnk", q, keys) * scale
        scores[..., len(q) :].masked_fill_(~read[groups], -torch.inf)
        weights = torch.cat([scores, points.scores(q, groups, scale)], -1).softmax(-1)
        exact = torch.einsum("hnk,khc->nhc", weights[..., : len(keys)], values)
        return (exact + points.read(weights[..., len(keys) :], q, scale))[None]

    def _seen(self, i: int, groups: Tensor, read: Tensor) -> Seen:
        assert self.layout is not None
        grids = tuple(reference.grid for reference in self.layout.references)
        mass = torch.cat([self.mass[i].sum(0, keepdim=True), self.mass[i]])
        return Seen(self.keys[i][0], self.values[i][0], read, mass, *self.seen[i], groups, grids, self.turn)  # type: ignore[arg-type]


def _turns(generator: Generator):  # type: ignore[no-untyped-def]
    rope = generator.pipe.transformer.pos_embed
    return lambda moved: rope(torch.cat([torch.zeros(len(moved), 1), moved], 1))


def cases(steps: int) -> list[Case]:
    """Every way and share; all read, beside them."""
    found = []
    for task in ("place", ALIGNED):
        found.append(Case("dense", 1.0, dense, task))
        for name, way, share in ((name, way, share) for share in SHARES for name, way in WAYS.items()):
            most = None if name in FINALISTS else (1, 1) if name in SLOW else FIRST
            found.append(Case(name, share, _answer(way, share), task, most=most))
    return found


def _answer(way: Way, share: float) -> Answer:
    reading = Reading(THIRDS, "tile", share)

    def answer(generator: Generator, question: Question, seed: int) -> Run:
        run = PointsRun(generator, reading, way)
        with stored(generator.pipe.transformer, generator.adapter, reading, run):
            picture = generator.picture(question, seed)
        references = TOKENS * len(question.example.references)
        read = share * references + way.work(generator.shape.head_dim) * references / way.cell
        return Run(picture, read, _ratio(generator, references, read))

    return answer


def _ratio(generator: Generator, references: int, read: float) -> float:
    shape, steps = generator.shape, generator.steps
    tokens = [
        StepTokens(LENGTH, TOKENS, references) if step in THIRDS else StepTokens(LENGTH, TOKENS, 0, cached=round(read))
        for step in range(steps)
    ]
    scoring = len(THIRDS) * scoring_flops(shape, TOKENS, references, shape.attention_layers)
    done = run_flops(shape, tokens, scoring=scoring).total
    return step_flops(shape, StepTokens(LENGTH, TOKENS, references)).total * steps / done
