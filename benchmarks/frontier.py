"""What each way to save work gains and loses, in one table: work at a published size, loss on the small model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_ref_attn.eval.aggregate import paired
from sparse_ref_attn.eval.rows import read_rows
from sparse_ref_attn.eval.work import flop_ratio

from .readings import ReadingRows
from .studies.stored import Reading

__all__ = ["frontier"]

SUBJECT = "subject PSNR (dB) vs target"
FAMILIES = ("subject-driven", "aligned")
STORED = (
    ("references stored, computed in 3 of 12 steps", Reading((0, 4, 8))),
    ("references stored, computed once", Reading((0,))),
    ("all tokens, 6 steps for 12", Reading(tuple(range(6)), steps=6)),
    ("all tokens, 4 steps for 12", Reading(tuple(range(4)), steps=4)),
)
DROPPED = (
    ("attention keeps 50 %", "ReCAST flat", "0.5"),
    ("attention keeps 25 %", "ReCAST flat", "0.25"),
    ("saliency keeps 25 %", "saliency", "0.25"),
    ("attention keeps 10 %", "ReCAST flat", "0.1"),
    ("reference made smaller, 25 %", "downscaled", "0.25"),
)
EVALUATED_STEPS = 8


def frontier(studies: Path, evaluation: Path) -> str:
    """Markdown: dense FLOPs over the run's, and paired differences to all tokens, in dB of the subject.

    Parameters
    ----------
    studies : Path
        With the rows of the study `reading`.
    evaluation : Path
        With those of the evaluation whose tables are on the page about quality.
    """
    reading, rows = ReadingRows(studies), [row for row in read_rows(evaluation)[1] if row[SUBJECT]]
    lines = [
        "| way to save | dense FLOPs / its own | subject-driven edits, dB | aligned edits, dB |",
        "|---|--:|--:|--:|",
    ]
    for name, way in STORED:
        lost = [reading.over_dense(family, "subject_psnr", way) for family in FAMILIES]
        lines.append(_line(name, reading.ratio(way, 1), lost))
    for name, method, keep in DROPPED:
        lost = [
            _interval(*paired(rows, SUBJECT, ("dense", family, method, keep), ("dense", family, "dense", "1.0")))
            for family in FAMILIES
        ]
        lines.append(_line(name, flop_ratio(method, float(keep), EVALUATED_STEPS), lost))
    return "\n".join(lines)


def _line(name: str, ratio: float, lost: Sequence[str]) -> str:
    return f"| {name} | {ratio:.2f}x | {' | '.join(lost)} |"


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
