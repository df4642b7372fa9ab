"""Tables of the studies `isolation` and `tuning`: what weights that were trained on lose or gain with their references
run in each way, against the right answer and beside the weights that they began from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from .measured import Measured, Term
from .results import known
from .studies import isolation, tuning
from .studies.reading import ALIGNED

__all__ = ["GROUPS", "TABLES", "training"]

FAMILIES = {"one reference": ("place",), "two references": ("pair",), "aligned edits": ALIGNED}

Line = tuple[str, str]
"""Weights, and what becomes of the references."""

_WHOLE = next(iter(isolation.WAYS))
GROUPS: dict[str, dict[Line, Sequence[Line]]] = {
    "isolation": {
        ("dense", _WHOLE): (
            ("isolated", isolation.ISOLATED),
            ("dense", "run at halves"),
            ("dense", "run in the first step"),
            ("dense", isolation.ISOLATED),
            ("isolated", _WHOLE),
            ("alongside", _WHOLE),
        ),
        ("alongside", _WHOLE): (("isolated", isolation.ISOLATED),),
    },
    "tuning": {
        (base, way): [(model, way) for model in tuning.MODELS[tuning.MODELS.index(base) + 1 :]]
        for base in ("dense", "drop")
        for way in tuning.WAYS
    }
    | {("drop-full", "every token"): [("drop-both", "every token")]},
}
"""Of each study: a line in dB, and those that are printed as differences to it."""


def training(folder: Path, study: str) -> str:
    """Markdown: of each group PSNR of the subject on its first line, and differences to that, in dB.

    Raises
    ------
    ValueError
        If there are no rows.
    """
    rows = known(folder / f"{study}.csv")
    if not rows:
        raise ValueError(f"{folder} must hold {study}.csv with rows, got none")
    weights = {row["model"]: row["weights"] for row in rows}
    rows = [row for row in rows if row["weights"] == weights[row["model"]]]
    lines = [
        f"| steps | weights | references | {' | '.join(FAMILIES)} |",
        f"|--:|---|---|{'--:|' * len(FAMILIES)}",
    ]
    for steps in sorted({int(row["steps"]) for row in rows}):
        here = [row for row in rows if int(row["steps"]) == steps]
        families = [Measured([row for row in here if row["task"] in tasks], []) for tasks in FAMILIES.values()]
        for base, others in GROUPS[study].items():
            lines += [f"| {steps} | {line}" for line in _group(families, base, others)]
    return "\n".join(lines)


TABLES = {study: partial(training, study=study) for study in GROUPS}


def _group(families: Sequence[Measured], base: Line, others: Sequence[Line]) -> Iterator[str]:
    yield " | ".join((*base, *(f"{_mean(family, base):.1f} dB" for family in families))) + " |"
    for line in others:
        yield " | ".join((*line, *(_difference(family, line, base) for family in families))) + " |"


def _where(line: Line) -> dict[str, object]:
    return dict(zip(("model", "method"), line, strict=True))


def _mean(rows: Measured, line: Line) -> float:
    values = rows.values("subject_psnr", _where(line)).values()
    return sum(values) / len(values)


def _difference(rows: Measured, line: Line, base: Line) -> str:
    terms = [Term(1.0, "subject_psnr", _where(line)), Term(-1.0, "subject_psnr", _where(base))]
    found = rows.interval(terms)
    return "" if found is None else f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
