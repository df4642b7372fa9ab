"""Records of runs that were made by hand."""

from __future__ import annotations

import math

import torch

from sparse_ref_attn.record import RunRecord, StepRecord
from sparse_ref_attn.types import Reference, RefSelection, TokenLayout


def layout_of(*shapes: tuple[int, int] | int) -> TokenLayout:
    """References of the given grids (or, for an int, that many tokens without one) after 4 generation tokens."""
    at, references = 4, []
    for shape in shapes:
        length = shape if isinstance(shape, int) else math.prod(shape)
        references.append(Reference(at, length, None if isinstance(shape, int) else shape))
        at += length
    return TokenLayout(at, 0, (0, 4), tuple(references))


def step_of(index: int, layout: TokenLayout, kept: list[int], kind: str = "sparse", seconds: float = 0.0) -> StepRecord:
    selection = RefSelection(torch.tensor(kept, dtype=torch.int64), layout.sizes)
    return StepRecord(index, kind, len(kept), 1, lambda: seconds, 0.0, selection)


def dense_step(index: int, layout: TokenLayout, kind: str = "profile", seconds: float = 0.0) -> StepRecord:
    return StepRecord(index, kind, layout.reference_tokens, 1, lambda: seconds)


def four_steps() -> RunRecord:
    """A 2 x 2 reference and one of 4 tokens without a grid; profile, dense, two sparse steps."""
    layout = layout_of((2, 2), 4)
    record = RunRecord(layout, 1, 4, notes=["the guard kept | more"], config={"keep": 0.25})
    record.steps = [
        dense_step(0, layout, "profile", 3.0),
        dense_step(1, layout, "dense", 2.0),
        step_of(2, layout, [0, 3, 4], seconds=0.75),
        step_of(3, layout, [3], seconds=0.25),
    ]
    for step in record.steps:
        step.host_seconds = 0.002
    record.mass = [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 0.5, 0.5, 0.5])]
    record.scores = record.mass
    return record
