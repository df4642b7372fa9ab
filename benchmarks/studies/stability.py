"""How much of a ranking stays from step to step, block to block, seed to seed and prompt to prompt (section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from torch import Tensor

from sparse_ref_attn.selection.stability import overlap, spearman

from .attention import SINGLE, masses
from .questions import Question
from .study import Generators, Measurement, Study

__all__ = ["KEYS", "PROMPTS", "STUDY", "VALUES"]

KEYS = ("model", "weights", "steps", "task", "subject", "seed", "kind", "a", "b")
VALUES = ("spearman", "overlap_15", "overlap_25", "chance_15", "chance_25")
PROMPTS = 3
"""Prompts beside the scene's own."""


def _rankings(generators: Generators, subject: int, seed: int) -> Iterator[Measurement]:
    """Rankings of "place" by the single-stream blocks' mass in dense runs, compared two by two.

    `kind` is "step" (a < b, one run), "block" (a, a block; b, the single-stream blocks' mean; step 0), "seed" (a, the
    first seed; b, another; step 0) or "prompt" (0, the scene's own; b, another; step 0).
    """
    generator = generators["dense"]
    key = generator.key("place", subject, seed)

    def rows() -> list[dict[str, Any]]:
        found = masses(generator, Question("place", subject), seed)
        made = list(_within(found))
        if seed:
            first = masses(generator, Question("place", subject), 0)
            made.append({"kind": "seed", "a": 0, "b": seed, **_alike(_start(first), _start(found))})
        for prompt in range(1, PROMPTS + 1):
            other = masses(generator, Question("place", subject, prompt), seed)
            made.append({"kind": "prompt", "a": 0, "b": prompt, **_alike(_start(found), _start(other))})
        return [{**key, **row} for row in made]

    yield Measurement({**key, "kind": "prompt", "a": 0, "b": PROMPTS}, rows)


def _within(found: Tensor) -> Iterator[dict[str, Any]]:
    steps = found[:, SINGLE].mean(1)
    for a, b in combinations(range(len(steps)), 2):
        yield {"kind": "step", "a": a, "b": b, **_alike(steps[a], steps[b])}
    for block, mass in enumerate(found[0]):
        yield {"kind": "block", "a": block, "b": "single", **_alike(mass, steps[0])}


def _start(found: Tensor) -> Tensor:
    return found[0, SINGLE].mean(0)


def _alike(a: Tensor, b: Tensor) -> dict[str, float]:
    """Rank correlation, and the share of the top 15 and 25 % of `a` that `b` has there too; by chance 0.15 and 0.25."""
    found = {"spearman": spearman([a], [b])[0]}
    for share in (15, 25):
        count = round(len(a) * share / 100)
        tops = [x.sort(descending=True, stable=True).indices[:count] for x in (a, b)]
        found |= {f"overlap_{share}": overlap(*tops), f"chance_{share}": count / len(a)}
    return found


STUDY = Study(KEYS, VALUES, _rankings)
