"""What a ranking is worth elsewhere: made at another step, in one block, with another seed, for another prompt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.eval.methods import dense_first
from sparse_ref_attn.selection import FromFunction

from .attention import SINGLE, masses
from .cases import Answer, Case, dense
from .generator import Generator, Run
from .questions import Question

__all__ = ["BLOCKS", "KEEP", "cases", "profiled_steps"]

KEEP = 0.15
BLOCKS = 6
OTHER = 1000  # added to a seed


def cases(steps: int) -> list[Case]:
    """Equal cost in every case: all tokens in step 0, then the share by a ranking that a dense run gave beforehand."""
    found = [Case("dense", 1.0, dense)]
    found += [
        Case(f"step {step}", KEEP, _ranked(lambda m, step=step: m[step, SINGLE].mean(0)))
        for step in profiled_steps(steps)
    ]
    found.append(Case("mean of the steps", KEEP, _ranked(lambda m: m[:, SINGLE].mean((0, 1)))))
    found += [Case(f"block {i}", KEEP, _ranked(lambda m, i=i: m[0, i])) for i in range(BLOCKS)]
    found.append(Case("double blocks", KEEP, _ranked(lambda m: m[0, : SINGLE.start].mean(0))))
    found.append(Case("all blocks", KEEP, _ranked(lambda m: m[0].mean(0))))
    found.append(Case("another seed", KEEP, _ranked(_start, seed=OTHER)))
    return [*found, Case("another prompt", KEEP, _ranked(_start, prompt=1))]


def profiled_steps(steps: int) -> list[int]:
    """Up to five steps from the first to the last."""
    return sorted({round(i * (steps - 1) / 4) for i in range(5)})


def _start(found: Tensor) -> Tensor:
    return found[0, SINGLE].mean(0)


def _ranked(score: Callable[[Tensor], Tensor], seed: int = 0, prompt: int = 0) -> Answer:
    """By a score of the `masses` of the same question's dense run, or of another seed's or prompt's."""

    def answer(generator: Generator, question: Question, own: int) -> Run:
        scores = score(masses(generator, Question(question.task, question.subject, prompt), own + seed))
        config = sra.SparseRef(FromFunction(lambda references: [scores]), dense_first(KEEP))
        return generator.run(question, own, config)

    return answer
