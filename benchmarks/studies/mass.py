"""Where the attention goes: entropy over the steps, share of the top tokens, and whether they are the subject's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparse_ref_attn.toy.scenes import TOKEN

from .attention import SINGLE, masses
from .generator import Generator
from .questions import Question
from .study import Generators, Measurement, Study

__all__ = ["KEYS", "STUDY", "TASKS", "VALUES"]

KEYS = ("model", "weights", "steps", "task", "subject", "seed", "step", "block")
VALUES = ("mass", "bits", "uniform_bits", "top_5", "top_10", "top_25", "top_50", "recall", "chance")
TASKS = ("place", "pair", "swap", "local", "global")
SHARES = (5, 10, 25, 50)


def _dense_runs(generators: Generators, subject: int, seed: int) -> Iterator[Measurement]:
    """A dense run of each task: a row for each step and block, and for the means of some blocks."""
    generator = generators["dense"]
    for task in TASKS:
        key = generator.key(task, subject, seed)
        rows = partial(_rows, generator, Question(task, subject), seed, key)
        yield Measurement({**key, "step": generator.steps - 1, "block": "all"}, rows)


def _rows(generator: Generator, question: Question, seed: int, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    cover = covered(question)
    return [
        {**key, "step": step, "block": name, **describe(mass, cover)}
        for step, blocks in enumerate(masses(generator, question, seed))
        for name, mass in _named(blocks)
    ]


def _named(blocks: Tensor) -> list[tuple[Any, Tensor]]:
    """(blocks, R): each, and the means over the joint-stream blocks, the single-stream ones and all."""
    means = (("double", blocks[: SINGLE.start]), ("single", blocks[SINGLE]), ("all", blocks))
    return [*enumerate(blocks), *((name, some.mean(0)) for name, some in means)]


def describe(mass: Tensor, cover: Tensor) -> dict[str, float]:
    """`VALUES` of the mass (R,) that reference tokens get, of which `cover` (R,) bool are the subject's.

    `bits` is the entropy of the normalised mass, at most `uniform_bits`; `top_25` the share of the mass in the top 25 %
    of the tokens; `recall` the share of the subject's n tokens among the top n, `chance` what it is for a random order.
    """
    p = (mass / mass.sum()).double()
    ordered = p.sort(descending=True).values
    n = int(cover.sum())
    found = {"mass": float(mass.sum()), "bits": float(-torch.special.xlogy(p, p).sum() / np.log(2))}
    found["uniform_bits"] = float(np.log2(len(p)))
    found |= {f"top_{share}": float(ordered[: -(-len(p) * share // 100)].sum()) for share in SHARES}
    found["recall"] = float(cover[mass.sort(descending=True, stable=True).indices[:n]].float().mean())
    return {**found, "chance": n / len(p)}


def covered(question: Question) -> Tensor:
    """Which reference tokens are at least half the subject's, (R,) bool."""
    mask = torch.from_numpy(np.concatenate(question.example.reference_masks, 1))[None]
    return functional.avg_pool2d(mask, TOKEN).flatten() >= 0.5


STUDY = Study(KEYS, VALUES, _dense_runs)
