"""Quality over tokens and over time: one call's methods as SVG for a page, a grid's means as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .aggregate import Mean
from .methods import rule_of
from .metrics import Metric
from .work import flop_ratio

__all__ = ["grid_plot", "quality_plot"]

_COLOURS = (
    "#c2410c", "#1c2430", "#1d4ed8", "#0e7490", "#be185d", "#15803d", "#7c3aed", "#a16207", "#94a3b8", "#4d7c0f",
    "#f59e0b", "#00b4d8", "#ff5fa2", "#84cc16", "#8b5a2b", "#111827",
)  # fmt: skip
_DECIDES = ("FirstBlockCache", "cache-dit")
_MARKERS = "osD^v<>PhX*dpH84"
_STYLES = {"flat": "-", "rising": "--", "falling": ":", "dense-first": "-."}
_OVER = {
    "keep": "reference tokens kept, % of all",
    "share": "reference tokens used, % of all, mean over the steps",
    "work": "dense FLOPs / the run's FLOPs at FLUX.1 Kontext's sizes, 1 reference",
}
_INK, _QUIET, _BOUND = "#1c2430", "#5b6675", "#c2410c"


def quality_plot(rows: Sequence[Mapping[str, Any]], metric: Metric, over: str) -> str:
    """One metric of every method over its tokens or its seconds, an ``<svg>``.

    Names stand in a column at the right.

    Over seconds, a hollow mark shows the time that a method was bound to take, joined to the time it took, and a line
    the dense run's time.

    Parameters
    ----------
    rows : sequence of mapping
        As `method_rows.rows_of` makes them, dense first.
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
    axes.axvline(dense[column], color=_QUIET, linewidth=1, linestyle=":")
    axes.annotate(
        "dense", (dense[column], 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right", va="top", fontsize=8, color=_QUIET,
    )  # fmt: skip
    axes.set_xlim(left=0)
    _named(axes, [(row["method"], row[column], row[metric.name]) for row in drawn])
    axes.set_xlabel(
        "reference tokens a step, mean" if over == "tokens" else "seconds of the whole call (hollow: the bound)"
    )
    axes.set_ylabel(f"{metric.name}, {'higher' if metric.higher_is_better else 'lower'} is closer to dense")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _named(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Names in a column at the right, in the order of their points' heights, each joined to its point."""
    low, high = axes.get_ylim()
    ordered = sorted(points, key=lambda point: point[2])
    apart = min(0.055, 1 / max(1, len(ordered)))
    heights = [(y - low) / (high - low) for _, _, y in ordered]
    for i in range(1, len(heights)):  # upwards, then down again from the top
        heights[i] = max(heights[i], heights[i - 1] + apart)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1 - apart * (len(heights) - 1 - i))
    for (name, x, y), height in zip(ordered, heights, strict=True):
        axes.annotate(
            name, (x, y), (1.03, height), xycoords="data", textcoords="axes fraction", fontsize=8, color=_INK,
            va="center", arrowprops={"arrowstyle": "-", "color": _QUIET, "linewidth": 0.5, "alpha": 0.6, "shrinkB": 3},
        )  # fmt: skip


def grid_plot(
    means: Sequence[Mean],
    metric: str,
    higher_is_better: bool,
    path: Path,
    *,
    over: str = "keep",
    against: str = "",
    steps: int | None = None,
) -> None:
    """One metric of every method over the tokens or the work, with intervals, a panel for each model and family.

    Parameters
    ----------
    means : sequence of Mean
        Of `aggregate`.
    metric : str
    higher_is_better : bool
    path : Path
        Of the PNG.
    over : {"keep", "share", "work"}
        The share that was asked for; the one used on the mean of all steps, which a dense first step raises; or the
        FLOP ratio of the whole run at FLUX.1 Kontext's sizes, for which `steps` must be known.
    against : str
        A baseline, whose paired differences are drawn; default the means themselves.
    steps : int, optional
        Of the runs.
    """
    from matplotlib.figure import Figure

    def place(mean: Mean) -> float:
        if over != "work":
            return float(getattr(mean, over))
        assert steps is not None
        return flop_ratio(mean.method, mean.keep, steps)

    own = [mean for mean in means if mean.metric == metric and mean.against == against]
    if over == "work":  # that of a cache that decides while it runs is known of that run alone
        own = [mean for mean in own if not set(_DECIDES) & set(mean.method.split(" + "))]
    models, families, methods = (
        list(dict.fromkeys(getattr(mean, name) for mean in own)) for name in ("model", "family", "method")
    )
    drawn = [method for method in methods if method != "dense"]
    rules = list(dict.fromkeys(rule_of(method)[0] for method in drawn))
    figure = Figure(figsize=(5.4 * len(models), 4.2 * len(families)), layout="constrained")
    panels = figure.subplots(len(families), len(models), sharey="row", sharex=True, squeeze=False)
    for i, family in enumerate(families):
        for j, model in enumerate(models):
            axes = panels[i][j]
            here = [mean for mean in own if (mean.model, mean.family) == (model, family)]
            for dense in (mean for mean in here if mean.method == "dense"):
                axes.axhline(dense.mean, color=_QUIET, linestyle=":", linewidth=1)
                axes.axhspan(dense.low, dense.high, color=_QUIET, alpha=0.15, linewidth=0)
            for k, method in enumerate(drawn):
                rule, schedule = rule_of(method)
                at = rules.index(rule)
                line = sorted((mean for mean in here if mean.method == method), key=place)
                aside = 1.0 if over == "work" else 1.006 ** (2 * k - len(drawn) + 1)  # or intervals hide each other
                x, y = [place(mean) * aside for mean in line], [mean.mean for mean in line]
                spread = [[m.mean - m.low for m in line], [m.high - m.mean for m in line]]
                axes.errorbar(
                    x, y, spread, color=_COLOURS[at % len(_COLOURS)], marker=_MARKERS[at % len(_MARKERS)], markersize=4,
                    linestyle=_STYLES[schedule], linewidth=1.2, elinewidth=0.8, capsize=2, label=method,
                )  # fmt: skip
            if over != "work":
                axes.set_xscale("log")
                ticks = sorted({mean.keep for mean in own})
                axes.set_xticks(ticks, [f"{100 * tick:.3g}" for tick in ticks])
                axes.minorticks_off()
            axes.set_title(f"weights: {model}; edits: {family}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        what = f"{metric} minus {against}'s" if against else metric
        panels[i][0].set_ylabel(f"{what}, {'higher' if higher_is_better else 'lower'} is better")
    for axes in panels[-1]:
        axes.set_xlabel(_OVER[over])
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 * len(models), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
