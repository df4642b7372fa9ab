"""The work of a recorded run, dense and as it ran."""

from __future__ import annotations

from dataclasses import replace

from ..cost import Flops, ModelShape, StepTokens, layered_flops, step_flops
from ..record import RunRecord, StepRecord
from .numbers import FlopSummary

__all__ = ["dense_flops", "recorded_flops", "summarise"]


def recorded_flops(shape: ModelShape, record: RunRecord) -> Flops:
    """Work of the run as it ran: every call of every step, and the measuring of attention."""
    total = Flops(0, int(record.scoring_flops))
    for count in record.isolated or ():
        total = total + step_flops(shape, StepTokens(0, 0, count), record.batch)
    total = total + _before(shape, record)
    for step in record.steps:
        tokens = _tokens(record, step)
        if step.layers is not None:
            work = layered_flops(shape, tokens, step.layers, record.batch)
        else:
            work = step_flops(shape, tokens, record.batch)
        total = total + work * step.calls
    return total


def dense_flops(shape: ModelShape, record: RunRecord) -> Flops:
    """Work of the same run with every reference token in every step.

    A run on reference K/V of an earlier one is compared with one that computes them in its first step, and one on a
    model that does not keep them itself with one whose references run in every step.
    """
    total = _before(shape, record)
    for step in record.steps:
        everything = replace(step, kept=record.layout.reference_tokens, from_block=0, means=0)
        if (step is record.steps[0] and not record.passes) or record.with_the_picture:
            everything.kind = "dense"
        total = total + step_flops(shape, _tokens(record, everything), record.batch) * step.calls
    return total


def summarise(shape: ModelShape, record: RunRecord) -> FlopSummary:
    """Both, in TFLOP."""
    return FlopSummary(dense_flops(shape, record).total / 1e12, recorded_flops(shape, record).total / 1e12)


def _before(shape: ModelShape, record: RunRecord) -> Flops:
    """Of the calls in which the model itself runs its references before the steps."""
    return sum((step_flops(shape, StepTokens(0, 0, count)) for count in record.passes), Flops(0, 0))


def _tokens(record: RunRecord, step: StepRecord) -> StepTokens:
    layout = record.layout
    if step.kind == "cached":
        return StepTokens.reading(layout, step.kept + step.means)
    if layout.generation[0] > 0:
        return StepTokens.storing(layout, step.kept)
    return StepTokens.of(layout, step.kept, step.from_block)
