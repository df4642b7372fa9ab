"""The table of the study `rest`: what stands for the tokens that a tile does not read, less the means that ship."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from .measured import Measured, Term
from .results import known
from .studies.points import WAYS
from .studies.reading import ALIGNED
from .studies.rest import FINALISTS, SHARES

__all__ = ["TABLES", "rests"]

FAMILIES = {"subject-driven": ("place",), "aligned": ALIGNED}
METRICS = {"dense": "dense_psnr", "subject, dense": "dense_subject_psnr", "subject, answer": "subject_psnr"}
SHIPPED = "means 4x4"


def rests(folder: Path, of: Collection[str] = tuple(WAYS)) -> str:
    """Markdown of the ways `of` that were measured: paired differences with 95 % intervals over the subjects, in dB."""
    rows = known(folder / "rest.csv")
    if not rows:
        raise ValueError(f"the folder must hold rows of the study 'rest', got {folder}")
    rows = [row for row in rows if row["weights"] == rows[-1]["weights"]]
    families = {
        family: Measured([row for row in rows if row["task"] in tasks], []) for family, tasks in FAMILIES.items()
    }
    numbers = [f"{family}, {against}" for family in FAMILIES for against in METRICS]
    words = ["what stands for the rest", "keys a query reads", "subjects, pictures"]
    lines = [f"| {' | '.join([*words, *numbers])} |", "|---|--:|--:|" + "--:|" * len(numbers)]
    for name in of:
        own = [row for row in rows if row["method"] == name]
        if name == SHIPPED or not own:
            continue
        counts = f"{len({row['subject'] for row in own})}, {len(own)}"
        cells = [name, f"{float(own[0]['tokens']):.0f}", counts]
        cells += [_difference(each, metric, name) for each in families.values() for metric in METRICS.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(rows: Measured, metric: str, name: str) -> str:
    where = {"model": "dense", "keep": SHARES[0]}
    terms = [Term(1.0, metric, {**where, "method": name}), Term(-1.0, metric, {**where, "method": SHIPPED})]
    found = rows.interval(terms)
    if found is None:
        return ""
    mean, low, high = (f"{value:+.2f}" for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


TABLES: dict[str, Callable[[Path], str]] = {"rests": rests, "rests_kept": partial(rests, of=FINALISTS)}
"""By the marks of the pages: Markdown from the folder of the studies' rows."""
