"""How good a picture is against the right answer, and how near the dense run's it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from sparse_ref_attn.eval.examples import Example
from sparse_ref_attn.eval.scores import Scorer

from .questions import held_out

__all__ = ["METRICS", "scorer"]

METRICS = {
    "subject_psnr": "subject PSNR (dB) vs target", "psnr": "PSNR (dB) vs target", "ssim": "SSIM vs target",
    "identity": "identity (MobileNetV2) vs target", "dense_subject_psnr": "subject PSNR (dB) vs dense",
    "dense_psnr": "PSNR (dB) vs dense",
}  # fmt: skip
"""The studies' columns, and what `Scorer` calls them. `identity` is empty where its weights are not installed."""

EQUAL = 60.0  # dB, given where pictures differ by less


def scorer(example: Example, dense: Any) -> Callable[[Any], dict[str, float | None]]:
    """The function that gives `METRICS` of a picture, (H, W, 3) in [0, 1]; decibels are at most 60.

    Those against `dense` are None for `dense` itself.
    """
    score = _scorer().scores(example, dense)

    def measured(picture: Any) -> dict[str, float | None]:
        found = score(picture)
        return {name: _capped(column, found.get(column)) for name, column in METRICS.items()}

    return measured


@cache
def _scorer() -> Scorer:
    return Scorer(held_out("place"), only=METRICS.values())


def _capped(column: str, value: float | None) -> float | None:
    return min(EQUAL, value) if value is not None and "(dB)" in column else value
