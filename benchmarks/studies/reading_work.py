"""What the readings of `reading` are worth in work at the size of published models: arithmetic, nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.shapes import TEXT_TOKENS
from sparse_ref_attn.cost import ModelShape, StepTokens, step_flops
from sparse_ref_attn.models import adapter_for, named_model

from .generator import Generator
from .reading import READINGS
from .rows import Rows
from .stored import Reading, work

__all__ = ["KEYS", "MODELS", "REFERENCES", "SIDE", "VALUES", "flop_ratio", "measure"]

KEYS = ("method", "keep", "steps", "model", "references")
VALUES = ("flop_ratio",)
MODELS = ("kontext", "klein-9b", "qwen-image-edit")
REFERENCES = (1, 4)
SIDE = 1024  # pixels of the picture and of every reference
TOKENS = (SIDE // 16) ** 2


def measure(
    generators: Mapping[str, Generator],
    rows: Rows,
    subjects: int,
    seeds: int,
    tell: Callable[[int, int], Any] = lambda done, of: None,
) -> None:
    """A row for each reading, model and number of references, at as many steps as the pictures have."""
    steps = next(iter(generators.values())).steps
    for done, model in enumerate(MODELS, 1):
        transformer = named_model(model)
        shape = adapter_for(transformer).shape(transformer)
        for reading in READINGS:
            for references in REFERENCES:
                key = {
                    "method": reading.name, "keep": reading.share, "steps": steps, "model": model,
                    "references": references,
                }  # fmt: skip
                if not rows.has(key):
                    rows.add([{**key, "flop_ratio": flop_ratio(shape, reading, references, steps)}])
        tell(done, len(MODELS))


def flop_ratio(shape: ModelShape, reading: Reading, references: int, steps: int) -> float:
    """Dense work over the run's, its rankings included, with references of the picture's size."""
    count = references * TOKENS
    dense = step_flops(shape, StepTokens(TEXT_TOKENS, TOKENS, count)).total * steps
    return dense / work(shape, reading, TEXT_TOKENS, TOKENS, count, steps).total
