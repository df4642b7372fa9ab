"""``assets/frontier.csv`` from rows that exist: the study `reading` and the evaluation of the page about quality.

python -m benchmarks.frontier_points
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean

from sparse_ref_attn.candidates import CANDIDATES, DENSE
from sparse_ref_attn.eval.aggregate import Values
from sparse_ref_attn.eval.metrics import Interval
from sparse_ref_attn.frontier import FRONTIER, Point, write_points
from sparse_ref_attn.source import source

from .evaluated_points import evaluated_points
from .measured import Measured, Term
from .readings import STEPS, ReadingRows
from .results import RESULTS
from .studies.reading import FEWER, HALVES, QUARTERS, SECOND, START, THIRDS
from .studies.stored import Reading

__all__ = ["READ", "points"]

READ: Mapping[str, Reading] = {
    "stored-sixths": Reading(SECOND),
    "stored-quarters": Reading(QUARTERS),
    "stored-thirds": Reading(THIRDS),
    "stored-thirds-warm": Reading(START),
    "stored-halves": Reading(HALVES),
    "stored-once": Reading((0,)),
    "tiles-8th-quarters": Reading(QUARTERS, "tile", 1 / 8, cell=4),
    "tiles-8th-thirds": Reading(THIRDS, "tile", 1 / 8, cell=4),
    "tiles-8th-thirds-warm": Reading(START, "tile", 1 / 8, cell=4),
    "tiles-8th-halves": Reading(HALVES, "tile", 1 / 8, cell=4),
    "tiles-8th-once": Reading((0,), "tile", 1 / 8, cell=4),
    "tiles-16th-thirds": Reading(THIRDS, "tile", 1 / 16, cell=4),
    "tiles-16th-halves": Reading(HALVES, "tile", 1 / 16, cell=4),
    "tiles-16th-once": Reading((0,), "tile", 1 / 16, cell=4),
    "tiles-8th-no-means": Reading(START, "tile", 1 / 8),
}
"""The study's settings that are candidates."""

SIX: Mapping[str, Reading] = {
    "stored-thirds": Reading((0, 2, 4), steps=6),
    "tiles-8th-thirds": Reading((0, 2, 4), "tile", 1 / 8, cell=4, steps=6),
}
"""Those in half the steps."""

KINDS = {"subject-driven": ("subject-driven", 1), "two references": ("subject-driven", 2), "aligned": ("aligned", 1)}
"""Of the study's families: the frontier's family, and references of an edit."""


def points() -> list[Point]:
    """All of them, in the order of the candidates."""
    found = [*_read(), *evaluated_points()]
    order = {key: place for place, key in enumerate([DENSE, *CANDIDATES])}
    return sorted(found, key=lambda p: (order[p.setting], -p.base_steps, -p.steps, p.references, p.family))


def _read() -> Iterator[Point]:
    rows = ReadingRows(RESULTS / "studies")
    settings = [*READ.items(), *SIX.items(), *((DENSE, reading) for reading in FEWER)]
    for key, reading in settings:
        for family, own in rows.families.items():
            if (point := _of_study(own, key, reading, family)) is not None:
                yield point


def _of_study(rows: Measured, key: str, reading: Reading, family: str) -> Point | None:
    where = {"model": "dense", "method": reading.name, "keep": reading.share}
    base = {"model": "dense", "method": "dense", "keep": 1.0}
    loss = rows.interval([Term(1.0, "subject_psnr", where), Term(-1.0, "subject_psnr", base)])
    if loss is None:
        return None
    pictures = rows.values("dense_psnr", where)
    steps = STEPS if reading.steps is None else reading.steps
    return _point(key, family, (STEPS, steps), loss, pictures, rows.rows[0]["weights"])


def _point(key: str, kind: str, steps: tuple[int, int], loss: Interval, pictures: Values, weights: str) -> Point:
    """`steps`: of the dense run, and its own; `pictures`: PSNR against dense by subject and seed."""
    code = "every token" if key == DENSE else f"sra.patch(pipe, {source(CANDIDATES[key])})"
    if steps[0] != steps[1]:
        code = f"{code}; num_inference_steps={steps[1]} for {steps[0]}"
    family, references = KINDS[kind]
    return Point(
        key, code, family, references, *steps, *(round(value, 3) for value in loss),
        round(fmean(pictures.values()), 2), len({subject for subject, _ in pictures}),
        len({seed for _, seed in pictures}), weights,
    )  # fmt: skip


if __name__ == "__main__":
    write_points(points(), FRONTIER)
