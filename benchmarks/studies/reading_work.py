"""What the readings of `reading` are worth in work at the size of published models: arithmetic, nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

from benchmarks.shapes import TEXT_TOKENS
from sparse_ref_attn.cost import ModelShape, StepTokens, step_flops
from sparse_ref_attn.models import adapter_for, named_model

from .reading import READINGS
from .stored import Reading, work
from .study import Generators, Measurement, Study

__all__ = ["KEYS", "MODELS", "REFERENCES", "SIDE", "STUDY", "VALUES", "flop_ratio"]

KEYS = ("method", "keep", "steps", "model", "references")
VALUES = ("flop_ratio",)
MODELS = ("kontext", "klein-9b", "qwen-image-edit")
REFERENCES = (1, 4)
SIDE = 1024  # pixels of the picture and of every reference
TOKENS = (SIDE // 16) ** 2


def _published(generators: Generators, subject: int, seed: int) -> Iterator[Measurement]:
    """A row for each reading, model and number of references, at as many steps as the pictures have, and no others."""
    if (subject, seed) != (0, 0):
        return
    steps = next(iter(generators.values())).steps
    for model in MODELS:
        transformer = named_model(model)
        shape = adapter_for(transformer).shape(transformer)
        for reading, references in product(READINGS, REFERENCES):
            key = {
                "method": reading.name, "keep": reading.share, "steps": steps, "model": model,
                "references": references,
            }  # fmt: skip
            yield Measurement(key, partial(_rows, key, shape, reading))


def _rows(key: Mapping[str, Any], shape: ModelShape, reading: Reading) -> list[dict[str, Any]]:
    return [{**key, "flop_ratio": flop_ratio(shape, reading, key["references"], key["steps"])}]


def flop_ratio(shape: ModelShape, reading: Reading, references: int, steps: int) -> float:
    """Dense work over the run's, its rankings included, with references of the picture's size."""
    count = references * TOKENS
    dense = step_flops(shape, StepTokens(TEXT_TOKENS, TOKENS, count)).total * steps
    return dense / work(shape, reading, TEXT_TOKENS, TOKENS, count, steps).total


STUDY = Study(KEYS, VALUES, _published)
