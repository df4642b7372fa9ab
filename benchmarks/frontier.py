"""The README's table of the frontier, from ``assets/frontier.csv``; and that file anew, from sweeps.

python -m benchmarks.frontier                       # prints the table
python -m benchmarks.frontier --draw                # docs/images/frontier.png
python -m benchmarks.frontier SWEEP [SWEEP ...]     # folders of `sra eval --frontier`: assets/frontier.csv, and both
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_ref_attn.candidates import DENSE
from sparse_ref_attn.eval.frontier.figure import figure
from sparse_ref_attn.eval.frontier.table import speed
from sparse_ref_attn.frontier import FRONTIER, Point, read_points, write_points
from sparse_ref_attn.vocabulary import OPEN_SCENERY

from .evaluated_points import evaluated_points
from .results import RESULTS

__all__ = ["FIGURE", "SHOWN", "frontier", "scenery", "take"]

FIGURE = RESULTS.parent.parent / "docs/images/frontier.png"
SHOWN: tuple[tuple[str, str, float], ...] = (
    ("references stored, computed in thirds of the run", "stored-thirds", 1),
    ("references stored, computed once", "stored-once", 1),
    ("a step cache alone, TaylorSeer lite at every second step", "taylorseer-lite-2", 1),
    ("all tokens, half of the steps", DENSE, 1 / 2),
    ("all tokens, a third of the steps", DENSE, 1 / 3),
    ("both: half of the steps, references computed in half of these", "stored-thirds", 1 / 2),
    ("attention keeps 50 %", "mass-50", 1),
    ("attention keeps 25 %", "mass-25", 1),
    ("saliency keeps 25 %", "saliency-25", 1),
    ("attention keeps 10 %", "mass-10", 1),
    ("reference made smaller, 25 %", "downscaled-25", 1),
)
"""Of the table: words, key, and share of the steps; the points of the most examples and seeds are shown."""
FAMILIES = (("subject-driven", 1), ("aligned", 1))
SCENERY: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("references stored, computed at quarters of the run", "stored-quarters", (12,)),
    ("references stored, computed at halves of the run", "stored-halves", (12,)),
    ("references stored, computed once", "stored-once", (12,)),
    ("all tokens in fewer steps", DENSE, (8, 6, 4)),
)
"""Of the table of scenery that is left open: words, key, and numbers of steps of 12."""


def frontier(points: Sequence[Point] | None = None) -> str:
    """Markdown: dense FLOPs over the run's with 1 and 4 references, and paired differences to all tokens, in dB.

    Parameters
    ----------
    points : sequence of Point, optional
        Default those that ship.
    """
    points = read_points() if points is None else points
    lines = [
        "| way to save | steps | FLOP ratio, 1 reference | 4 references | subject-driven, dB | aligned edits, dB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for words, key, share in SHOWN:
        own = [p for p in points if p.setting == key and abs(p.steps / p.base_steps - share) < 1e-6]
        base = max(own, key=lambda p: (p.seeds, p.examples, p.base_steps)).base_steps if own else 0
        by = {(p.family, p.references): p for p in own if p.base_steps == base}
        if all(by.get(family) is not None for family in FAMILIES):
            steps = by[FAMILIES[0]].steps
            ratios = " | ".join(f"{speed((key, steps, base), 'kontext', count):.2f}x" for count in (1, 4))
            losses = " | ".join(_loss(by[family]) for family in FAMILIES)
            lines.append(f"| {words} | {steps} of {base} | {ratios} | {losses} |")
    return "\n".join(lines)


def scenery(points: Sequence[Point] | None = None) -> str:
    """Markdown: how much of the contrast of open scenery is lost, with one reference and with two, in dB.

    Parameters
    ----------
    points : sequence of Point, optional
        Default those that ship.
    """
    points = read_points() if points is None else points
    by = {(p.setting, p.steps, p.references): p for p in points if p.family == OPEN_SCENERY}
    lines = [
        "| way to save | steps | work of 1 reference | one reference, dB | work of 4 references | two references, dB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for words, key, numbers in SCENERY:
        for steps in numbers:
            one, two = by[key, steps, 1], by[key, steps, 2]
            work = [f"{speed((key, steps, one.base_steps), 'kontext', count):.2f}x" for count in (1, 4)]
            cells = (work[0], _loss(one), work[1], _loss(two))
            lines.append(f"| {words} | {steps} of {one.base_steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def take(folders: Sequence[Path], to: Path = FRONTIER, drawn: Path = FIGURE) -> list[Point]:
    """Put the points of sweeps, of different numbers of steps, and of the evaluation into one file, and draw them."""
    points = [point for folder in folders for point in read_points(folder / "frontier.csv")]
    points += evaluated_points()
    write_points(points, to)
    figure(points, drawn)
    return points


def _loss(point: Point) -> str:
    assert point.loss_db is not None
    return f"{point.loss_db:+.1f} [{point.low:+.1f}, {point.high:+.1f}]"


if __name__ == "__main__":
    if sys.argv[1:] == ["--draw"]:
        figure(read_points(), FIGURE)
    elif sys.argv[1:]:
        take([Path(name) for name in sys.argv[1:]])
    else:
        print(frontier())
