"""Quality over tokens and over time, as SVG for a page or PNG for a file."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .metrics import Metric

__all__ = ["quality_plot"]

_INK, _QUIET, _BOUND = "#1c2430", "#5b6675", "#c2410c"


def quality_plot(rows: Sequence[Mapping[str, Any]], metric: Metric, over: str) -> str:
    """One metric of every method over its tokens or its seconds, an ``<svg>``.

    Over seconds, a hollow mark shows the time that a method was bound to take, joined to the time it took, and a line
    the dense run's time.

    Parameters
    ----------
    rows : sequence of mapping
        As `page.rows_of` makes them, dense first.
    metric : Metric
        A value that is infinite (equal pictures) is not drawn.
    over : {"tokens", "seconds"}
    """
    from matplotlib.figure import Figure

    column = {"tokens": "tokens_a_step", "seconds": "seconds"}[over]
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    dense, *others = rows
    drawn = [row for row in others if math.isfinite(row[metric.name])]
    for row in drawn:
        x, y = row[column], row[metric.name]
        if over == "seconds" and row["bound_seconds"] is not None:
            axes.plot([row["bound_seconds"], x], [y, y], color=_BOUND, linewidth=1, zorder=1)
            axes.plot(row["bound_seconds"], y, "o", color=_BOUND, markerfacecolor="white", zorder=2)
        axes.plot(x, y, "o", color=_INK, zorder=3)
        axes.annotate(row["method"], (x, y), (5, 4), textcoords="offset points", fontsize=8, color=_INK)
    axes.axvline(dense[column], color=_QUIET, linewidth=1, linestyle=":")
    axes.annotate(
        "dense", (dense[column], 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right", va="top", fontsize=8, color=_QUIET,
    )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("reference tokens a step" if over == "tokens" else "seconds (hollow: bound)")
    axes.set_ylabel(f"{metric.name}, {'higher' if metric.higher_is_better else 'lower'} is closer to dense")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
