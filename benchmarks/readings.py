"""Tables of the study `reading`: what is read of stored reference K/V, beside what it costs at published sizes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from .measured import Measured, Term, read, text
from .studies.reading import ALIGNED, COMPARED, FINALISTS, FIRST, GRANULARITIES, GRID
from .studies.stored import Reading

__all__ = ["TABLES"]

FAMILIES = {"subject-driven": ("place",), "aligned": ALIGNED, "two references": ("pair",)}
AGAINST = {"dense": "dense_psnr", "answer": "subject_psnr"}
MODELS = ("kontext", "klein-9b", "qwen-image-edit")
STEPS = 12
NUMBERS = [f"{family}, {against}" for family in FAMILIES for against in AGAINST]


class Rows:
    """Both CSVs of the study in a folder, of runs of `STEPS` steps."""

    def __init__(self, folder: Path) -> None:
        measured = read(folder, "reading")
        if measured is None or int(measured.rows[0]["steps"]) != STEPS:
            raise ValueError(f"the folder must hold rows of the study 'reading' with {STEPS} steps, got {folder}")
        self.families = {
            family: Measured([row for row in measured.rows if row["task"] in tasks], measured.runs)
            for family, tasks in FAMILIES.items()
        }
        with (folder / "reading_work.csv").open(newline="", encoding="utf-8") as file:
            self._work = {
                (row["method"], row["keep"], row["model"], row["references"]): float(row["flop_ratio"])
                for row in csv.DictReader(file)
                if int(row["steps"]) == STEPS
            }

    def ratio(self, reading: Reading, references: int) -> str:
        """Of each model, in the order of `MODELS`, or one number where they are the same."""
        key = reading.name, text(reading.share)
        values = [f"{self._work[(*key, model, str(references))]:.2f}" for model in MODELS]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    def mean(self, family: str, metric: str, where: dict[str, object]) -> str:
        """With half the width of its interval."""
        found = self.families[family].interval([Term(1.0, metric, where)])
        return "" if found is None else f"{found.mean:.1f} ± {(found.high - found.low) / 2:.1f}"

    def difference(self, family: str, metric: str, one: Reading, other: Reading) -> str:
        """Paired, with its interval."""
        found = self.families[family].interval([Term(1.0, metric, _where(one)), Term(-1.0, metric, _where(other))])
        if found is None:
            return ""
        mean, low, high = (f"{value:+.1f}" for value in (found.mean, found.low, found.high))
        return f"{mean} [{low}, {high}]"

    def first(self, family: str, reading: Reading) -> float:
        """Mean PSNR against dense over the subjects and seeds of a first look."""
        values = self.families[family].values(AGAINST["dense"], _where(reading))
        return fmean(value for (subject, seed), value in values.items() if (int(subject), int(seed)) < FIRST)


def _where(reading: Reading) -> dict[str, object]:
    return {"model": "dense", "method": reading.name, "keep": reading.share}


def readings(folder: Path) -> str:
    """Markdown of every setting that was compared at length: run ratios, and PSNR with 95 % intervals."""
    rows = Rows(folder)
    dense = {"model": "dense", "method": "dense", "keep": 1.0}
    lines = _header(["read, at steps with reference rows", "share", "1 reference", "4 references"], NUMBERS)
    lines.append(_line(["dense", "", "1", "1"], rows, partial(rows.mean, where=dense)))
    for reading in FINALISTS:
        cells = [reading.name, _percent(reading.share), *(rows.ratio(reading, n) for n in (1, 4))]
        lines.append(_line(cells, rows, partial(rows.mean, where=_where(reading))))
    return "\n".join(lines)


def compared(folder: Path) -> str:
    """Markdown of pairs: paired differences with 95 % intervals, and run ratios with four references."""
    rows = Rows(folder)
    lines = _header(["this", "ratio", "minus this", "ratio"], NUMBERS)
    for one, other in COMPARED:
        cells = []
        for reading in (one, other):
            share = f", {_percent(reading.share)}" if reading.share < 1 else ""
            cells += [f"{reading.name}{share}", rows.ratio(reading, 4)]
        lines.append(_line(cells, rows, partial(rows.difference, one=one, other=other)))
    return "\n".join(lines)


def granularity(folder: Path) -> str:
    """Markdown of a first look at what is read, at one schedule: PSNR against dense, subject-driven / aligned."""
    rows = Rows(folder)
    columns = list(dict.fromkeys((each.share, each.cell) for each in GRID))
    named = {0: "", 4: " + 4x4", 2: " + 2x2"}
    lines = _header(["a ranking for"], [f"{_percent(share)}{named[cell]}" for share, cell in columns])
    by = {(each.per, each.tile, each.share, each.cell): each for each in GRID}
    for per, tile in GRANULARITIES:
        cells = [f"each tile of {tile}x{tile}" if per == "tile" else "the run" if per == "run" else "each layer"]
        for column in columns:
            found = by.get((per, tile, *column))
            values = [] if found is None else [rows.first(family, found) for family in ("subject-driven", "aligned")]
            cells.append(" / ".join(f"{value:.1f}" for value in values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _line(cells: Sequence[str], rows: Rows, value: Callable[[str, str], str]) -> str:
    numbers = [value(family, metric) for family in rows.families for metric in AGAINST.values()]
    return f"| {' | '.join([*cells, *numbers])} |"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _header(words: Sequence[str], numbers: Sequence[str]) -> list[str]:
    return [f"| {' | '.join([*words, *numbers])} |", "|" + "---|" * len(words) + "--:|" * len(numbers)]


TABLES = {"reading": readings, "reading_compared": compared, "reading_granularity": granularity}
"""By the marks of the pages: Markdown from the folder of the studies' rows."""
