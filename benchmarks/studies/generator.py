"""Runs of the small pipeline, dense or sparse, from one seed each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparse_ref_attn as sra
from sparse_ref_attn.eval.models import EvalModel
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.record import RunRecord
from sparse_ref_attn.report.work import dense_flops, recorded_flops

from .quality import scorer
from .questions import Question

__all__ = ["TOKENS", "Generator", "Picture", "Run"]

TOKENS = 256
"""Of a reference, and of a picture."""

Picture = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Run:
    """One picture, (H, W, 3) in [0, 1]; reference tokens a step, mean; dense work over its work, in FLOPs."""

    picture: Picture
    tokens: float
    flop_ratio: float


class Generator:
    """A model under evaluation that answers questions; the same run is made once.

    Parameters
    ----------
    model : EvalModel
        Its name is that of its rows; its pipeline is not patched.
    """

    def __init__(self, model: EvalModel) -> None:
        self.model, self.pipe, self.steps = model, model.pipe, model.steps
        self.adapter = adapter_for(self.pipe.transformer)
        self.shape = self.adapter.shape(self.pipe.transformer)
        self.weights = _digest(self.pipe.transformer)
        self._made: dict[tuple[Question, int, sra.SparseRef | None], Run] = {}
        self._scores: dict[tuple[Question, int], Callable[[Picture], dict[str, float | None]]] = {}

    def key(self, task: str, subject: int, seed: int) -> dict[str, Any]:
        """What a row of any study begins with."""
        return {
            "model": self.model.name, "weights": self.weights, "steps": self.steps, "task": task,
            "subject": subject, "seed": seed,
        }  # fmt: skip

    def forget(self) -> None:
        """Drop the runs that were made."""
        self._made.clear()
        self._scores.clear()

    def picture(self, question: Question, seed: int, steps: int | None = None) -> Picture:
        """The pipeline's answer as it stands, patched or not."""
        found: Picture = self.model.generate(question.example, seed, output="np", steps=steps)
        return found

    def run(self, question: Question, seed: int, config: sra.SparseRef | None = None) -> Run:
        """One run; None is dense."""
        key = (question, seed, config)
        if key not in self._made:
            made = self.model.run(question.example, seed, config, output="np")
            if made.record is None:
                self._made[key] = Run(made.picture, float(TOKENS * len(question.example.references)), 1.0)
            else:
                self._made[key] = Run(made.picture, made.record.mean_tokens, self.ratio(made.record))
        return self._made[key]

    def quality(self, question: Question, seed: int, picture: Picture) -> dict[str, float | None]:
        """`METRICS` of an answer, beside the dense one."""
        key = (question, seed)
        if key not in self._scores:
            self._scores[key] = scorer(question.example, self.run(question, seed).picture)
        return self._scores[key](picture)

    def ratio(self, record: RunRecord) -> float:
        """Dense work over the recorded run's."""
        return dense_flops(self.shape, record).total / recorded_flops(self.shape, record).total


def _digest(transformer: Any) -> str:
    """Eight hexadecimal digits that tell weights apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]
