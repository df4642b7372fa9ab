"""What finer reading of stored reference K/V is worth, beside reading all of them at fewer steps with reference rows.

`cases` are compared at length; `reading_grid` has every setting, on fewer subjects.
"""

from __future__ import annotations

from sparse_ref_attn.cost import StepTokens, step_flops
from sparse_ref_attn.toy.words import LENGTH

from .cases import Answer, Case, dense
from .generator import TOKENS, Generator, Run
from .questions import Question
from .stored import Reading, stored, work

__all__ = ["ALIGNED", "FINALISTS", "GRID", "TASKS", "cases", "every"]

ALIGNED = ("swap", "local", "global")
TASKS = ("place", ALIGNED, "pair")
"""Subject-driven edits, aligned ones (one a subject by turns), and subject-driven ones with two references."""

START = (0, 1, 4, 8)
THIRDS = (0, 4, 8)
EARLY = (0, 1, 2, 4, 8)
EVERY = tuple(range(12))
SCHEDULES = ((0,), (0, 4), (0, 6), THIRDS, START, EARLY, EVERY[::2])
SHARES = (1 / 4, 1 / 8, 1 / 16)
FEWER = (6, 4, 3)

GRID: tuple[Reading, ...] = (
    *(Reading(at) for at in SCHEDULES),
    *(Reading(START, per, share, cell=cell) for per in ("run", "layer") for share in SHARES for cell in (0, 4, 2)),
    *(Reading(START, "tile", share, 4, cell) for share in SHARES for cell in (0, 4, 2)),
    *(Reading(START, "tile", share, tile, cell) for tile in (2, 8) for share in SHARES[1:] for cell in (0, 4)),
    *(Reading(THIRDS, "tile", share, 4, cell) for share in SHARES[1:] for cell in (0, 4)),
    *(Reading(at, "tile", share, 4, 4) for at in ((0,), (0, 4), (0, 6), EARLY) for share in SHARES[1:]),
    *(Reading(at, "layer", 1 / 8, cell=4) for at in ((0, 4), EVERY[::2])),
    *(Reading(at, full=full) for full in ("kept", "rolling") for at in (START, EARLY, EVERY[::2], EVERY)),
    *(Reading(at, full="kept", part=0.5) for at in (START, EVERY[::2])),
    *(Reading(at, "tile", 1 / 8, 4, 4, "rolling") for at in (START, EARLY, EVERY[::2])),
)
FINALISTS: tuple[Reading, ...] = ()


def cases(steps: int) -> list[Case]:
    """The settings that are compared at length, on every task."""
    return _cases(FINALISTS, TASKS, steps)


def every(steps: int) -> list[Case]:
    """Every setting, with one reference."""
    return _cases(GRID, TASKS[:2], steps)


def _cases(readings: tuple[Reading, ...], tasks: tuple[str | tuple[str, ...], ...], steps: int) -> list[Case]:
    found = []
    for task in tasks:
        found.append(Case("dense", 1.0, dense, task))
        found += [Case(f"dense, {fewer} steps", 1.0, _fewer(fewer), task) for fewer in FEWER if fewer < steps]
        found += [Case(reading.name, reading.share, _read(reading), task) for reading in readings]
    return found


def _read(reading: Reading) -> Answer:
    def answer(generator: Generator, question: Question, seed: int) -> Run:
        with stored(generator.pipe.transformer, generator.adapter, reading):
            picture = generator.picture(question, seed)
        references, steps = TOKENS * len(question.scene.references), generator.steps
        every = step_flops(generator.shape, StepTokens(LENGTH, TOKENS, references)).total * steps
        counts = [s.references + s.cached for s in reading.tokens(LENGTH, TOKENS, references, steps)]
        own = work(generator.shape, reading, LENGTH, TOKENS, references, steps).total
        return Run(picture, sum(counts) / steps, every / own)

    return answer


def _fewer(steps: int) -> Answer:
    """Dense, in fewer steps: what the same work is worth without a cache."""

    def answer(generator: Generator, question: Question, seed: int) -> Run:
        own = generator.steps
        generator.steps = steps
        try:
            picture = generator.picture(question, seed)
        finally:
            generator.steps = own
        references = TOKENS * len(question.scene.references)
        return Run(picture, float(references), own / steps)

    return answer
