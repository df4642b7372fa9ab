"""What a study of pictures is made of: cases, each run on the same subjects and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sparse_ref_attn as sra

from .generator import Generator, Run
from .quality import METRICS, quality
from .questions import Question
from .rows import Rows

__all__ = ["KEYS", "VALUES", "Case", "dense", "measure", "sparse"]

KEYS = ("model", "weights", "steps", "task", "subject", "seed", "method", "keep")
VALUES = ("tokens", "flop_ratio", *METRICS)

Answer = Callable[[Generator, Question, int], Run]


@dataclass(frozen=True)
class Case:
    """One method on one task.

    Parameters
    ----------
    method : str
        Its name in the rows.
    keep : float
        Share of the reference tokens that it is meant to keep after the first step.
    answer : callable
        (generator, question, seed) to `Run`.
    task : str or tuple of str
        Several are asked of the subjects by turns.
    model : str
        Of the generators given to `measure`.
    most : tuple of (int, int), optional
        Subjects and seeds that it is run on at most; None for as many as are asked for.
    """

    method: str
    keep: float
    answer: Answer
    task: str | tuple[str, ...] = "place"
    model: str = "dense"
    most: tuple[int, int] | None = None

    def asked(self, subject: int) -> str:
        """The task of a subject."""
        return self.task if isinstance(self.task, str) else self.task[subject % len(self.task)]


def dense(generator: Generator, question: Question, seed: int) -> Run:
    """Every token in every step."""
    return generator.run(question, seed)


def sparse(config: Callable[[int], sra.SparseRef]) -> Answer:
    """The configuration of a seed: what is drawn at random is drawn anew with each."""
    return lambda generator, question, seed: generator.run(question, seed, config(seed))


def measure(
    cases: Sequence[Case],
    generators: Mapping[str, Generator],
    rows: Rows,
    subjects: int,
    seeds: int,
    tell: Callable[[int, int], Any] = lambda done, of: None,
) -> None:
    """Run every case whose model there is on every subject and seed, subject after subject, and add the rows."""
    cases = [case for case in cases if case.model in generators]
    for subject in range(subjects):
        for seed in range(seeds):
            for case in cases:
                if case.most is not None and not (subject < case.most[0] and seed < case.most[1]):
                    continue
                _one(case, generators[case.model], rows, subject, seed)
            for generator in generators.values():
                generator.forget()
            tell(subject * seeds + seed + 1, subjects * seeds)


def _one(case: Case, generator: Generator, rows: Rows, subject: int, seed: int) -> None:
    task = case.asked(subject)
    key = {**generator.key(case.model, task, subject, seed), "method": case.method, "keep": case.keep}
    if rows.has(key):
        return
    question = Question(task, subject)
    run = case.answer(generator, question, seed)
    reference = None if case.answer is dense else generator.run(question, seed).picture
    measured = quality(run.picture, question.scene, reference)
    rows.add([{**key, "tokens": run.tokens, "flop_ratio": run.flop_ratio, **measured}])
