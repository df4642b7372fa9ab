"""The table of the study `isolation`: what references that run by themselves lose against the right answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .measured import Measured, Term
from .results import known
from .studies.isolation import ISOLATED, WAYS
from .studies.reading import ALIGNED

__all__ = ["LINES", "isolations"]

FAMILIES = {"one reference": ("place",), "two references": ("pair",), "aligned edits": ALIGNED}
BASE = {"model": "dense", "method": next(iter(WAYS)), "keep": 1.0}
LINES = (
    ("isolated", ISOLATED),
    ("dense", "run at halves"),
    ("dense", "run in the first step"),
    ("dense", ISOLATED),
    ("isolated", BASE["method"]),
    ("control", BASE["method"]),
)
"""Weights and what becomes of the references, less `BASE`."""


def isolations(folder: Path) -> str:
    """Markdown: PSNR of the subject of the run that computes all in every step, and differences to it, in dB.

    Raises
    ------
    ValueError
        If there are no rows.
    """
    rows = known(folder / "isolation.csv")
    if not rows:
        raise ValueError(f"{folder} must hold isolation.csv with rows, got none")
    weights = {row["model"]: row["weights"] for row in rows}
    rows = [row for row in rows if row["weights"] == weights[row["model"]]]
    lines = [
        f"| steps | weights | references | {' | '.join(FAMILIES)} |",
        f"|--:|---|---|{'--:|' * len(FAMILIES)}",
    ]
    for steps in sorted({int(row["steps"]) for row in rows}):
        lines += _of_steps(steps, [row for row in rows if int(row["steps"]) == steps])
    return "\n".join(lines)


def _of_steps(steps: int, rows: list[dict[str, str]]) -> Iterator[str]:
    families = [Measured([row for row in rows if row["task"] in tasks], []) for tasks in FAMILIES.values()]
    whole = [f"{_mean(family):.1f} dB" for family in families]
    yield f"| {steps} | {BASE['model']} | {BASE['method']} | {' | '.join(whole)} |"
    for model, method in LINES:
        where = {"model": model, "method": method, "keep": 1.0}
        cells = [_difference(family, where) for family in families]
        yield f"| {steps} | {model} | {method} | {' | '.join(cells)} |"


def _mean(rows: Measured) -> float:
    values = rows.values("subject_psnr", BASE).values()
    return sum(values) / len(values)


def _difference(rows: Measured, where: dict[str, object]) -> str:
    found = rows.interval([Term(1.0, "subject_psnr", where), Term(-1.0, "subject_psnr", BASE)])
    return "" if found is None else f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
