"""Runs of the small pipeline, dense or sparse, from one seed each."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import sparse_ref_attn as sra
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.record import RunRecord
from sparse_ref_attn.report.work import dense_flops, recorded_flops
from sparse_ref_attn.toy.calls import call_arguments

from .questions import Question

__all__ = ["Generator", "Run", "tokens_a_step"]

TOKENS = 256  # of a reference


@dataclass(frozen=True)
class Run:
    """One picture, (H, W, 3) in [0, 1]; reference tokens a step, mean; dense work over its work, in FLOPs."""

    picture: NDArray[np.floating[Any]]
    tokens: float
    flop_ratio: float


class Generator:
    """One pipeline that answers questions in so many steps; the same run is made once.

    Parameters
    ----------
    pipe : diffusers.FluxKontextPipeline
        Not patched.
    steps : int
    """

    def __init__(self, pipe: Any, steps: int) -> None:
        self.pipe, self.steps = pipe, steps
        self.adapter = adapter_for(pipe.transformer)
        self.shape = self.adapter.shape(pipe.transformer)
        self.weights = _digest(pipe.transformer)
        self._made: dict[tuple[Question, int, sra.SparseRef | None], Run] = {}
        pipe.set_progress_bar_config(disable=True)

    def key(self, model: str, task: str, subject: int, seed: int) -> dict[str, Any]:
        """What a row of any study begins with; `model` is the name of these weights."""
        return {
            "model": model, "weights": self.weights, "steps": self.steps, "task": task,
            "subject": subject, "seed": seed,
        }  # fmt: skip

    def forget(self) -> None:
        """Drop the runs that were made."""
        self._made.clear()

    def picture(self, question: Question, seed: int) -> NDArray[np.floating[Any]]:
        """The pipeline's answer as it stands, patched or not."""
        return self.pipe(
            **call_arguments(question.scene), num_inference_steps=self.steps, output_type="np",
            generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip

    def run(self, question: Question, seed: int, config: sra.SparseRef | None = None) -> Run:
        """One run; None is dense."""
        key = (question, seed, config)
        if key not in self._made:
            self._made[key] = self._run(question, seed, config)
        return self._made[key]

    def _run(self, question: Question, seed: int, config: sra.SparseRef | None) -> Run:
        with sra.patched(self.pipe, config) if config is not None else nullcontext() as handle:
            picture = self.picture(question, seed)
        if handle is None:
            size = TOKENS * len(question.scene.references)
            return Run(picture, float(size), 1.0)
        return Run(picture, tokens_a_step(handle.record), self.ratio(handle.record))

    def ratio(self, record: RunRecord) -> float:
        """Dense work over the recorded run's."""
        return dense_flops(self.shape, record).total / recorded_flops(self.shape, record).total


def tokens_a_step(record: RunRecord) -> float:
    """Reference tokens that took part, mean over the steps."""
    return sum(record.mean_kept(step) for step in record.steps) / len(record.steps)


def _digest(transformer: Any) -> str:
    """Eight hexadecimal digits that tell weights apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]
