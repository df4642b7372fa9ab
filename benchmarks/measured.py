"""Rows of one study, read back: values of a subject and seed, and what the paired interval of a sum of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_ref_attn.eval.aggregate import Values, combined, interval
from sparse_ref_attn.eval.metrics import Interval
from sparse_ref_attn.eval.rows import written

from .results import known
from .studies.study import DIGITS

__all__ = ["Measured", "Term", "read", "text"]

RESAMPLES = 9999
Row = Mapping[str, str]


@dataclass(frozen=True)
class Term:
    """`weight` times a metric of the rows that `where` names, by their columns' values."""

    weight: float
    metric: str
    where: Mapping[str, object]


class Measured:
    """The rows of one study on one set of weights a model.

    Parameters
    ----------
    rows : sequence of mapping
        Of the study's CSV.
    runs : sequence of mapping
        Lines of ``runs.csv`` about them, latest last.
    """

    def __init__(self, rows: Sequence[Row], runs: Sequence[Row]) -> None:
        self.rows, self.runs = rows, runs
        self._by: dict[tuple[str, ...], dict[tuple[str, ...], list[Row]]] = {}

    def values(self, metric: str, where: Mapping[str, object]) -> Values:
        """By (subject, seed) the mean of the metric over the rows named; a step of "last" is the last one."""
        found: dict[tuple[str, str], list[float]] = {}
        for row in self._named(where):
            if row[metric]:
                found.setdefault((row["subject"], row["seed"]), []).append(float(row[metric]))
        return {key: sum(each) / len(each) for key, each in found.items()}

    def _named(self, where: Mapping[str, object]) -> list[Row]:
        """The rows of these values, from an index of each set of columns."""
        columns = tuple(where)
        if columns not in self._by:
            index = self._by[columns] = {}
            for row in self.rows:
                index.setdefault(tuple(row[name] for name in columns), []).append(row)
        last = str(int(self.rows[0]["steps"]) - 1)
        return self._by[columns].get(tuple(last if value == "last" else text(value) for value in where.values()), [])

    def interval(self, terms: Sequence[Term]) -> Interval | None:
        """Mean and 95 % interval of the sum of the terms over the subjects that have all of them; None below two."""
        values = combined([(term.weight, self.values(term.metric, term.where)) for term in terms])
        if len({subject for subject, _ in values}) < 2:
            return None
        return interval(values, RESAMPLES)[0]

    def distinct(self, column: str) -> list[str]:
        """The column's values in the order of the rows."""
        return list(dict.fromkeys(row[column] for row in self.rows))


def read(folder: Path, study: str) -> Measured | None:
    """The study's rows of the weights and steps that ``runs.csv`` names last for each model; None without any."""
    latest = {line["model"]: line for line in known(folder / "runs.csv") if line["study"] == study}
    rows = [
        row
        for row in known(folder / f"{study}.csv")
        if row["model"] in latest and all(row[name] == latest[row["model"]][name] for name in ("weights", "steps"))
    ]
    models = {row["model"] for row in rows}
    return Measured(rows, [line for line in latest.values() if line["model"] in models]) if rows else None


def text(value: object) -> str:
    """A value as the studies' CSVs write it."""
    return written(value, DIGITS)
