"""Rows of one study, read back: values of a subject and seed, and what the paired interval of a sum of them is."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_ref_attn.eval.metrics import Interval, mean_interval

__all__ = ["Measured", "Term", "read", "text"]

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

    def values(self, metric: str, where: Mapping[str, object]) -> dict[tuple[str, str], float]:
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
        """Mean and 95 % interval of the sum of the terms over the subjects that have all of them; None below two.

        Subjects are drawn, not seeds: the seeds of one are not independent.
        """
        each = [(term.weight, self.values(term.metric, term.where)) for term in terms]
        keys = [key for key in each[0][1] if all(key in values for _, values in each)]
        if len({subject for subject, _ in keys}) < 2:
            return None
        sums = [sum(weight * values[key] for weight, values in each) for key in keys]
        return mean_interval(sums, [subject for subject, _ in keys])

    def distinct(self, column: str) -> list[str]:
        """The column's values in the order of the rows."""
        return list(dict.fromkeys(row[column] for row in self.rows))


def read(folder: Path, study: str) -> Measured | None:
    """The study's rows of the weights and steps that ``runs.csv`` names last for each model; None without any."""
    path, about = folder / f"{study}.csv", folder / "runs.csv"
    if not path.exists() or not about.exists():
        return None
    latest = {line["model"]: line for line in _lines(about) if line["study"] == study}
    rows = [
        row
        for row in _lines(path)
        if row["model"] in latest and all(row[name] == latest[row["model"]][name] for name in ("weights", "steps"))
    ]
    models = {row["model"] for row in rows}
    return Measured(rows, [line for line in latest.values() if line["model"] in models]) if rows else None


def text(value: object) -> str:
    """A value as the studies' CSVs write it."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
