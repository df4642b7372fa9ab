"""What a study of pictures is made of: cases, each run on the same subjects and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sparse_ref_attn as sra

from .generator import Generator, Run
from .quality import METRICS
from .questions import Question
from .study import Generators, Measurement, Study

__all__ = ["KEYS", "VALUES", "Case", "dense", "pictures", "sparse"]

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
        Of the generators that the study is given.
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


def pictures(cases: Sequence[Case]) -> Study:
    """The study that runs every case whose model there is: a row a picture."""

    def of(generators: Generators, subject: int, seed: int) -> Iterator[Measurement]:
        for case in cases:
            beyond = case.most is not None and not (subject < case.most[0] and seed < case.most[1])
            if case.model in generators and not beyond:
                yield _measurement(case, generators[case.model], subject, seed)

    return Study(KEYS, VALUES, of)


def _measurement(case: Case, generator: Generator, subject: int, seed: int) -> Measurement:
    question = Question(case.asked(subject), subject)
    key = {**generator.key(question.task, subject, seed), "method": case.method, "keep": case.keep}

    def rows() -> list[dict[str, Any]]:
        run = case.answer(generator, question, seed)
        quality = generator.quality(question, seed, run.picture)
        return [{**key, "tokens": run.tokens, "flop_ratio": run.flop_ratio, **quality}]

    return Measurement(key, rows)
