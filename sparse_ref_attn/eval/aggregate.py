"""Means and paired differences of an evaluation's rows, with bootstrap intervals."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .methods import method_name, rule_of
from .metrics import Interval, mean_interval

__all__ = ["Mean", "Values", "aggregate", "combined", "interval", "markdown", "paired", "write_means"]

RESAMPLES = 2000
BASELINES = ("dense", "random", "ReCAST flat")
"""Methods that the others are compared with, where they were run."""


@dataclass(frozen=True)
class Mean:
    """One number: the mean of a metric, or of its paired differences to a baseline.

    Parameters
    ----------
    model, family, method : str
    keep, share : float
        Share of the tokens that was asked for, and the mean over steps and pictures that was used.
    metric : str
    against : str
        "" for the mean itself; else the difference to this method at the same share ("dense": at all tokens) on the
        same examples and seeds: a baseline, or the same rule with a flat schedule; "model NAME" is the same method of
        another model.
    n, examples : int
        Pictures, and examples that they are of. Pictures without a finite value (PSNR of equal ones) are left out.
    mean, low, high : float
        With a 95 % interval, whose groups are the examples; NaN bounds for a single example.
    """

    model: str
    family: str
    method: str
    keep: float
    share: float
    metric: str
    against: str
    n: int
    examples: int
    mean: float
    low: float
    high: float


Cell = tuple[str, str, str, str]  # model, family, method, keep
Values = dict[tuple[str, str], float]
"""By example and seed."""


def aggregate(
    rows: Sequence[Mapping[str, str]], metrics: Sequence[str], *, baselines: Sequence[str] = BASELINES
) -> list[Mean]:
    """Means of all cells of a grid, and their paired differences to baselines and between models.

    Parameters
    ----------
    rows : sequence of mapping
        As `evaluate` returns them.
    metrics : sequence of str
        Columns.
    baselines : sequence of str
        Methods.

    Raises
    ------
    ConfigError
        If there are no rows.

    Examples
    --------
    >>> rows = [
    ...     {"model": "a", "family": "f", "example": e, "seed": "0", "method": m, "keep": k, "share": k, "x": v}
    ...     for e, m, k, v in [("1", "dense", "1.0", "5"), ("2", "dense", "1.0", "6"),
    ...                        ("1", "grid", "0.5", "3"), ("2", "grid", "0.5", "4")]]
    >>> [(m.method, m.against, m.mean) for m in aggregate(rows, ["x"])]
    [('dense', '', 5.5), ('grid', '', 3.5), ('grid', 'dense', -2.0)]
    """
    if not rows:
        raise ConfigError("a summary must have rows, got none")
    cells: dict[Cell, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        cells[_cell_of(row)].append(row)
    models = list(dict.fromkeys(cell[0] for cell in cells))
    found = []
    for metric in metrics:
        values = {cell: _values(own, metric) for cell, own in cells.items()}
        for cell, own in values.items():
            model, family, method, keep = cell
            share = sum(float(row["share"]) for row in cells[cell]) / len(cells[cell])
            others: dict[str, Cell] = {
                name: (model, family, name, "1.0" if name == "dense" else keep) for name in baselines if name != method
            }
            rule, schedule = rule_of(method)
            if schedule != "flat":
                flat = method_name(rule)
                others[flat] = (model, family, flat, keep)
            others |= {f"model {name}": (name, family, method, keep) for name in models if name != model}
            parts = {"": own}
            for against, other in others.items():
                parts[against] = combined([(1.0, own), (-1.0, values.get(other, {}))])
            for against, part in parts.items():
                if part:
                    mean, examples = interval(part)
                    found.append(
                        Mean(model, family, method, float(keep), share, metric, against, len(part), examples, *mean)
                    )
    return found


def paired(rows: Sequence[Mapping[str, str]], metric: str, cell: Cell, other: Cell) -> Interval:
    """Mean difference between two cells over the pictures that both have, with its interval over examples.

    Parameters
    ----------
    rows : sequence of mapping
        As for `aggregate`.
    metric : str
        A column.
    cell, other : tuple of str
        Model, family, method and share kept, as in the rows; `other` is taken away.

    Raises
    ------
    ConfigError
        If they have no picture in common.

    Examples
    --------
    >>> rows = [{"model": "a", "family": "f", "example": e, "seed": "0", "method": m, "keep": "0.5", "x": v}
    ...         for e, m, v in [("1", "edges", "5"), ("2", "edges", "6"), ("1", "grid", "3"), ("2", "grid", "5")]]
    >>> paired(rows, "x", ("a", "f", "edges", "0.5"), ("a", "f", "grid", "0.5")).mean
    1.5
    """
    own, base = (_values([row for row in rows if _cell_of(row) == wanted], metric) for wanted in (cell, other))
    both = combined([(1.0, own), (-1.0, base)])
    if not both:
        raise ConfigError(f"{cell} and {other} must have pictures in common, got none with {metric}")
    return interval(both)[0]


def combined(terms: Sequence[tuple[float, Values]]) -> Values:
    """The weighted sum of several cells' values, for the pictures that all of them have.

    Examples
    --------
    >>> combined([(1.0, {("a", "0"): 5.0, ("b", "0"): 6.0}), (-0.5, {("a", "0"): 4.0})])
    {('a', '0'): 3.0}
    """
    (_, first), *_ = terms
    keys = [key for key in first if all(key in values for _, values in terms)]
    return {key: sum(weight * values[key] for weight, values in terms) for key in keys}


def interval(values: Values, resamples: int = RESAMPLES) -> tuple[Interval, int]:
    """Mean with its 95 % interval over examples, of which there must be one, and how many there are.

    Examples are drawn, not seeds: the seeds of one are not independent. The bounds of a single example are NaN.
    """
    groups = [example for example, _ in values]
    count = len(set(groups))
    if count == 1:
        return Interval(sum(values.values()) / len(values), math.nan, math.nan), 1
    return mean_interval(list(values.values()), groups, resamples=resamples), count


def write_means(path: Path, means: Sequence[Mean]) -> None:
    """All of them as CSV, numbers with six digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Mean)], lineterminator="\n")
        writer.writeheader()
        for mean in means:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(mean).items()})


def markdown(means: Sequence[Mean], metric: str) -> str:
    """One metric as a table: a line for each model, family and method, a column for each share.

    Each cell has the mean and half the width of its interval.
    """
    own = [mean for mean in means if mean.metric == metric and not mean.against]
    keeps = sorted({mean.keep for mean in own}, reverse=True)
    table: dict[tuple[str, str, str], dict[float, Mean]] = defaultdict(dict)
    for mean in own:
        table[mean.model, mean.family, mean.method][mean.keep] = mean
    lines = [
        f"| model | family | method | {' | '.join(f'{keep:.3g}' for keep in keeps)} |",
        "|---|---|---|" + "--:|" * len(keeps),
    ]
    for (model, family, method), line in table.items():
        cells = [_mean(line[keep]) if keep in line else "" for keep in keeps]
        lines.append(f"| {model} | {family} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(mean: Mean) -> str:
    spread = "" if math.isnan(mean.low) else f" ± {(mean.high - mean.low) / 2:.2g}"
    return f"{mean.mean:.4g}{spread}"


def _cell_of(row: Mapping[str, str]) -> Cell:
    return row["model"], row["family"], row["method"], row["keep"]


def _values(rows: Sequence[Mapping[str, Any]], metric: str) -> Values:
    found = {(row["example"], row["seed"]): float(row[metric]) for row in rows if row[metric] != ""}
    return {key: value for key, value in found.items() if math.isfinite(value)}
