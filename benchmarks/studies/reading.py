"""What finer reading of stored reference K/V is worth, beside reading all of them and making them anew less often."""

from __future__ import annotations

from typing import Literal

from sparse_ref_attn.cost import StepTokens, step_flops
from sparse_ref_attn.toy.words import LENGTH

from .cases import Answer, Case, dense
from .generator import TOKENS, Generator, Run
from .questions import Question
from .stored import Reading, stored, work

__all__ = [
    "ALIGNED", "ALL_READ", "AT_EQUAL_WORK", "COMPARED", "FEWER", "FINALISTS", "FIRST", "GRANULARITIES", "GRID",
    "READINGS", "TASKS", "cases",
]  # fmt: skip

ALIGNED = ("swap", "local", "global")
TASKS = ("place", ALIGNED, "pair")
"""Subject-driven edits, aligned ones (one a subject by turns), and subject-driven ones with two references."""
FIRST = (8, 1)
"""Subjects and seeds of the settings that are not compared at length, which have one reference."""

START = (0, 1, 4, 8)
THIRDS = (0, 4, 8)
HALVES = (0, 6)
QUARTERS = (0, 3, 6, 9)
EARLY = (0, 1, 2, 4, 8)
SECOND = (0, 2, 4, 6, 8, 10)
EVERY = tuple(range(12))
SHARES = (1 / 4, 1 / 8, 1 / 16)

_READ = {at: Reading(at) for at in ((0,), HALVES, THIRDS, QUARTERS, START, SECOND)}
_TILE = {at: Reading(at, "tile", 1 / 8, cell=4) for at in (HALVES, THIRDS, QUARTERS, START)}
_NO_MEANS = Reading(START, "tile", 1 / 8)
_LAYER = Reading(START, "layer", 1 / 4, cell=4)
_ROLLING = {at: Reading(at, full="rolling") for at in (SECOND, EVERY)}
_KEPT = Reading(START, full="kept")
_FEWER = {steps: Reading(tuple(range(steps)), steps=steps) for steps in (6, 4, 3)}
_SIX = Reading((0, 2, 4), steps=6)
_SIX_TILE = Reading((0, 2, 4), "tile", 1 / 8, cell=4, steps=6)

FINALISTS = (
    *_FEWER.values(), *_READ.values(), *_TILE.values(), _NO_MEANS, _LAYER, *_ROLLING.values(), _KEPT, _SIX, _SIX_TILE,
)  # fmt: skip

ALL_READ = tuple(_READ[at] for at in ((0,), HALVES, THIRDS, QUARTERS, SECOND))
FEWER = tuple(_FEWER.values())
AT_EQUAL_WORK = (*_TILE.values(), _LAYER, *_ROLLING.values(), _KEPT, *_READ.values(), _SIX, _SIX_TILE)
"""Compared with `ALL_READ`, evenly spaced, and with dense runs in fewer steps at the same work."""

COMPARED = (
    (_TILE[HALVES], _READ[HALVES]),
    (_TILE[THIRDS], _READ[THIRDS]),
    (_TILE[QUARTERS], _READ[QUARTERS]),
    (_TILE[START], _NO_MEANS),
    (_TILE[START], _LAYER),
    (_READ[QUARTERS], _READ[START]),
    (_SIX_TILE, _SIX),
)
"""Pairs that differ in one thing."""

GRANULARITIES: tuple[tuple[Literal["run", "layer", "tile"], int], ...] = (
    ("run", 4), ("layer", 4), ("tile", 8), ("tile", 4), ("tile", 2),
)  # fmt: skip
GRID = tuple(
    Reading(START, per, share, tile, cell)
    for per, tile in GRANULARITIES
    for share in SHARES
    for cell in (0, 4, 2)
    if tile == 4 or (share < SHARES[0] and cell != 2)
)
"""What is read, at one schedule; the other tiles with fewer shares and cells."""

_OTHERS = (
    *(Reading(at) for at in ((0, 4), EARLY)),
    *GRID,
    *(Reading(THIRDS, "tile", share, 4, cell) for share in SHARES[1:] for cell in (0, 4)),
    *(Reading(at, "tile", share, cell=4) for at in ((0,), (0, 4), HALVES, QUARTERS, EARLY) for share in SHARES[1:]),
    *(Reading(at, "layer", 1 / 8, cell=4) for at in ((0, 4), SECOND)),
    *(Reading(at, full=full) for full in ("kept", "rolling") for at in (START, EVERY, EARLY, SECOND)),
    *(Reading(at, full="kept", part=0.5) for at in (START, SECOND)),
    *(Reading(at, "tile", 1 / 8, cell=4, full="rolling") for at in (START, EARLY, SECOND)),
)
READINGS = (*FINALISTS, *dict.fromkeys(each for each in _OTHERS if each not in FINALISTS))


def cases(steps: int) -> list[Case]:
    """Every setting that so many steps allow."""
    found = []
    for task in TASKS:
        found.append(Case("dense", 1.0, dense, task))
        for reading in READINGS:
            most = None if reading in FINALISTS else FIRST
            if max(reading.at) < steps and (most is None or task != "pair"):
                found.append(Case(reading.name, reading.share, _answer(reading), task, most=most))
    return found


def _answer(reading: Reading) -> Answer:
    def answer(generator: Generator, question: Question, seed: int) -> Run:
        own = generator.steps
        with stored(generator.pipe.transformer, generator.adapter, reading):
            picture = generator.picture(question, seed, steps=reading.steps)
        references = TOKENS * len(question.example.references)
        dense = step_flops(generator.shape, StepTokens(LENGTH, TOKENS, references)).total * own
        steps = reading.tokens(LENGTH, TOKENS, references, own)
        done = work(generator.shape, reading, LENGTH, TOKENS, references, own).total
        return Run(picture, sum(s.references + s.cached for s in steps) / len(steps), dense / done)

    return answer
