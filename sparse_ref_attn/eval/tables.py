"""What is made of the rows of an evaluation: means as CSV, a page of tables, and plots."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .aggregate import aggregate, markdown, write_means
from .metrics.faces import FACE, FACE_FOUND
from .plots import grid_plot

__all__ = ["write_results"]

_INTRO = """# Results

Means of the pictures with half the width of their 95 % bootstrap interval (groups: examples), by the share of the
reference tokens that was kept. `summary.csv` has paired differences to dense, random and ReCAST, and between models.
"""


def write_results(
    folder: Path, rows: Sequence[Mapping[str, str]], metrics: Mapping[str, bool], steps: int | None = None
) -> str:
    """Write ``summary.csv``, ``summary.md`` and two plots a metric, three where ``random`` was run, and one over the
    work of a published model where the number of `steps` is known.

    Parameters
    ----------
    folder : Path
    rows : sequence of mapping
        As `evaluate` returns them.
    metrics : mapping of str to bool
        Columns, and whether higher is better.
    steps : int, optional
        Of the runs.

    Returns
    -------
    str
        The tables.
    """
    means = aggregate(rows, list(metrics))
    write_means(folder / "summary.csv", means)
    shown = [metric for metric in metrics if any(mean.metric == metric for mean in means)]
    tables = "\n\n".join(f"## {metric}\n\n{markdown(means, metric)}{_faceless(rows, metric)}" for metric in shown)
    (folder / "summary.md").write_text(f"{_INTRO}\n{tables}\n", encoding="utf-8")
    for metric in shown:
        stem = re.sub(r"\W+", "-", metric.lower()).strip("-")
        grid_plot(means, metric, metrics[metric], folder / f"{stem}.png")
        grid_plot(means, metric, metrics[metric], folder / f"{stem}-used.png", over="share")
        if steps is not None:
            grid_plot(means, metric, metrics[metric], folder / f"{stem}-work.png", over="work", steps=steps)
        if any(mean.metric == metric and mean.against == "random" for mean in means):
            grid_plot(means, metric, metrics[metric], folder / f"{stem}-minus-random.png", against="random")
    return tables


def _faceless(rows: Sequence[Mapping[str, str]], metric: str) -> str:
    """Below the column of found faces: in how many pictures there was none, and of how many examples' references."""
    if not metric.startswith(FACE_FOUND):
        return ""
    alike = f"{metric.replace(FACE_FOUND, FACE)} vs reference"
    seen = [row for row in rows if row[metric]]
    without = sum(float(row[metric]) < 1 for row in seen)
    bare = {row["example"] for row in seen if float(row[metric]) == 1 and not row.get(alike)}
    told = f"{without} of {len(seen)} pictures are without a face and have no similarity"
    return f"\n\n{told}" + (f"; no face was found in the reference of {', '.join(sorted(bare))}." if bare else ".")
