"""Tables of the study `reading`: what is read of stored reference K/V, beside what it costs at published sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from .measured import Measured, Term, text
from .results import known
from .studies.reading import (
    ALIGNED,
    ALL_READ,
    AT_EQUAL_WORK,
    COMPARED,
    FEWER,
    FINALISTS,
    FIRST,
    GRANULARITIES,
    GRID,
)
from .studies.stored import Reading

__all__ = ["TABLES", "ReadingRows"]

FAMILIES = {"subject-driven": ("place",), "aligned": ALIGNED, "two references": ("pair",)}
FIRST_FAMILIES = ("subject-driven", "aligned")
AGAINST = {"dense": "dense_psnr", "answer": "subject_psnr"}
MODELS = ("kontext", "klein-9b", "qwen-image-edit")
STEPS = 12
NUMBERS = [f"{family}, {against}" for family in FAMILIES for against in AGAINST]


class ReadingRows:
    """Both CSVs of the study in a folder: runs of `STEPS` steps, of the weights that were measured last."""

    def __init__(self, folder: Path) -> None:
        rows, work = (
            [row for row in known(folder / f"{name}.csv") if row["steps"] == str(STEPS)]
            for name in ("reading", "reading_work")
        )
        if not rows:
            raise ValueError(f"the folder must hold rows of the study 'reading' with {STEPS} steps, got {folder}")
        rows = [row for row in rows if row["weights"] == rows[-1]["weights"]]
        self.families = {
            family: Measured([row for row in rows if row["task"] in tasks], []) for family, tasks in FAMILIES.items()
        }
        self._work = {
            (row["method"], row["keep"], row["model"], row["references"]): float(row["flop_ratio"]) for row in work
        }

    def ratio(self, reading: Reading, references: int, model: str = MODELS[0]) -> float:
        """Dense work over the run's."""
        return self._work[reading.name, text(reading.share), model, str(references)]

    def ratios(self, reading: Reading, references: int) -> str:
        """Of each model, in the order of `MODELS`, or one number where they are the same."""
        values = [f"{self.ratio(reading, references, model):.2f}" for model in MODELS]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    def mean(self, family: str, metric: str, where: dict[str, object]) -> str:
        """With half the width of its interval."""
        found = self.families[family].interval([Term(1.0, metric, where)])
        return "" if found is None else f"{found.mean:.1f} ± {(found.high - found.low) / 2:.1f}"

    def difference(self, family: str, metric: str, one: Reading, others: Mapping[Reading, float]) -> str:
        """Paired, with its interval: `one` less the weighted sum of the others."""
        terms = [Term(1.0, metric, _where(one)), *(Term(-w, metric, _where(each)) for each, w in others.items())]
        found = self.families[family].interval(terms)
        if found is None:
            return ""
        mean, low, high = (f"{value:+.1f}" for value in (found.mean, found.low, found.high))
        return f"{mean} [{low}, {high}]"

    def over_dense(self, family: str, metric: str, one: Reading) -> str:
        """As `difference`, to the dense run in all steps."""
        dense = {"model": "dense", "method": "dense", "keep": 1.0}
        found = self.families[family].interval([Term(1.0, metric, _where(one)), Term(-1.0, metric, dense)])
        if found is None:
            return ""
        mean, low, high = (f"{value:+.1f}" for value in (found.mean, found.low, found.high))
        return f"{mean} [{low}, {high}]"

    def mix(self, reading: Reading, of: Sequence[Reading], references: int) -> dict[Reading, float]:
        """Weights of the two of `of` between which `reading` lies in work, that cost as much as it does together.

        One that is cheaper or dearer than all of them is compared with the cheapest or dearest alone.
        """
        work = {each: 1 / self.ratio(each, references) for each in of}
        ordered, own = sorted(of, key=work.__getitem__), 1 / self.ratio(reading, references)
        for cheap, dear in pairwise(ordered):
            if work[cheap] <= own <= work[dear]:
                share = (own - work[cheap]) / (work[dear] - work[cheap])
                return {cheap: 1 - share, dear: share}
        return {ordered[0] if own <= work[ordered[0]] else ordered[-1]: 1.0}

    def first(self, family: str, reading: Reading) -> float:
        """Mean PSNR against dense over the subjects and seeds of a first look."""
        values = self.families[family].values(AGAINST["dense"], _where(reading))
        subjects, seeds = FIRST
        return fmean(value for (i, seed), value in values.items() if int(i) < subjects and int(seed) < seeds)


def _where(reading: Reading) -> dict[str, object]:
    return {"model": "dense", "method": reading.name, "keep": reading.share}


def readings(folder: Path, of: Sequence[Reading] = FINALISTS) -> str:
    """Markdown of settings that were compared at length: run ratios, and PSNR with 95 % intervals."""
    rows = ReadingRows(folder)
    dense = {"model": "dense", "method": "dense", "keep": 1.0}
    lines = _header(["read, at steps with reference rows", "share", "1 reference", "4 references"], NUMBERS)
    lines.append(_line(["dense", "", "1", "1"], rows, partial(rows.mean, where=dense)))
    for reading in of:
        cells = [reading.name, _percent(reading.share), *(rows.ratios(reading, n) for n in (1, 4))]
        lines.append(_line(cells, rows, partial(rows.mean, where=_where(reading))))
    return "\n".join(lines)


def compared(folder: Path) -> str:
    """Markdown of pairs: paired differences with 95 % intervals, and run ratios with four references."""
    rows = ReadingRows(folder)
    lines = _header(["this", "ratio", "minus this", "ratio"], NUMBERS)
    for one, other in COMPARED:
        cells = [cell for reading in (one, other) for cell in (_named(reading), rows.ratios(reading, 4))]
        lines.append(_line(cells, rows, partial(rows.difference, one=one, others={other: 1.0})))
    return "\n".join(lines)


def equal_work(of: Sequence[Reading], folder: Path) -> str:
    """Markdown of paired differences in PSNR against dense, to runs of `of` at the same work, with 95 % intervals."""
    rows = ReadingRows(folder)
    columns = [(family, n) for n in (1, 4) for family in FAMILIES if (family, n) != ("two references", 1)]
    lines = _header(["", "1 reference", "4 references"], [f"{family}, work of {n}" for family, n in columns])
    for reading in AT_EQUAL_WORK:
        if reading not in of:
            cells = [_named(reading), *(f"{rows.ratio(reading, n):.2f}" for n in (1, 4))]
            cells += [
                rows.difference(family, AGAINST["dense"], reading, rows.mix(reading, of, n)) for family, n in columns
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def granularity(folder: Path) -> str:
    """Markdown of a first look at what is read, at one schedule: PSNR against dense, subject-driven / aligned."""
    rows = ReadingRows(folder)
    columns = list(dict.fromkeys((each.share, each.cell) for each in GRID))
    named = {0: "", 4: " + 4x4", 2: " + 2x2"}
    lines = _header(["a ranking for"], [f"{_percent(share)}{named[cell]}" for share, cell in columns])
    by = {(each.per, each.tile, each.share, each.cell): each for each in GRID}
    everything = " / ".join(f"{rows.first(family, Reading(GRID[0].at)):.1f}" for family in FIRST_FAMILIES)
    lines.append(f"| everything: {everything} |{'  |' * len(columns)}")
    for per, tile in GRANULARITIES:
        cells = [f"each tile of {tile}x{tile}" if per == "tile" else "the run" if per == "run" else "each layer"]
        for column in columns:
            found = by.get((per, tile, *column))
            values = [] if found is None else [rows.first(family, found) for family in FIRST_FAMILIES]
            cells.append(" / ".join(f"{value:.1f}" for value in values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _line(cells: Sequence[str], rows: ReadingRows, value: Callable[[str, str], str]) -> str:
    numbers = [value(family, metric) for family in rows.families for metric in AGAINST.values()]
    return f"| {' | '.join([*cells, *numbers])} |"


def _named(reading: Reading) -> str:
    return f"{reading.name}, {_percent(reading.share)}" if reading.share < 1 else reading.name


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _header(words: Sequence[str], numbers: Sequence[str]) -> list[str]:
    return [f"| {' | '.join([*words, *numbers])} |", "|" + "---|" * len(words) + "--:|" * len(numbers)]


TABLES: dict[str, Callable[[Path], str]] = {
    "reading": readings,
    "reading_stored": partial(readings, of=(*ALL_READ, *FEWER)),
    "reading_all": partial(equal_work, ALL_READ),
    "reading_steps": partial(equal_work, FEWER),
    "reading_compared": compared,
    "reading_granularity": granularity,
}
"""By the marks of the pages: Markdown from the folder of the studies' rows."""
