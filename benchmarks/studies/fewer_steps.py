"""How many dense steps are enough, where there is one right answer and where scenery is left open and must be drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from sparse_ref_attn.eval.metrics import SceneryContrast, SceneryPsnr
from sparse_ref_attn.eval.metrics.scenery import grown
from sparse_ref_attn.toy.pipeline import knows_open_scenery
from sparse_ref_attn.toy.words import OPEN_TASKS

from .generator import Generator
from .quality import scorer
from .questions import Question
from .study import Generators, Measurement, Study

__all__ = ["ALIGNED", "ANSWERED", "KEYS", "STEPS", "STUDY", "VALUES"]

STEPS = (28, 12, 8, 4, 2, 1)
ALIGNED = ("swap", "local", "global")
ANSWERED = ("place", "pair", *ALIGNED)
KEYS = ("model", "weights", "steps", "task", "subject", "seed")
VALUES = ("subject_psnr", "psnr", "dense_psnr", "scenery_psnr", "kind", "first", "second", "contrast", "task_contrast")
"""`dense_psnr` is against the picture of the most steps. The last six are of open scenery: four of the nearest texture,
and how far colours lie apart (`SceneryContrast`), in the picture and in the one that the task drew."""

_EDGE = 2  # pixels beside a subject that do not count as scenery


def _dense_runs(generators: Generators, subject: int, seed: int) -> Iterator[Measurement]:
    """One task with one reference, one with two and one that is aligned; and open scenery, of weights that know it."""
    generator = generators["dense"]
    tasks = ["place", "pair", ALIGNED[subject % len(ALIGNED)]]
    tasks += OPEN_TASKS if knows_open_scenery(generator.model.path) else ()
    for task in tasks:
        key = generator.key(task, subject, seed)
        rows = partial(_rows, generator, Question(task, subject), seed, key)
        yield Measurement({**key, "steps": STEPS[-1]}, rows)


def _rows(generator: Generator, question: Question, seed: int, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    example = question.example
    pictures = {steps: generator.picture(question, seed, steps=steps) for steps in STEPS}
    most = pictures[STEPS[0]]
    score, rows = scorer(example, most), []
    hidden = grown(question.scene.mask > 0, _EDGE)
    scenery, contrast = SceneryPsnr(hidden), SceneryContrast(hidden)
    for steps, picture in pictures.items():
        found = score(picture) | ({"dense_psnr": None} if picture is most else {})
        row = {**key, "steps": steps, **{name: found[name] for name in VALUES[:3]}}
        if example.open_scenery:
            nearest = scenery.nearest(picture)
            texture = nearest.texture
            row |= {
                "scenery_psnr": nearest.psnr, "kind": texture.kind, "first": texture.first, "second": texture.second,
                "contrast": contrast(picture), "task_contrast": contrast(question.scene.target),
            }  # fmt: skip
        rows.append(row)
    return rows


STUDY = Study(KEYS, VALUES, _dense_runs)
