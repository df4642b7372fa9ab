"""Likeness to the dense picture over the speed-up, a panel for each model and number of references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .reading import Point, SharedReport

__all__ = ["on_frontier", "scatter"]

_COLOURS = (
    "#c2410c", "#1d4ed8", "#15803d", "#be185d", "#0e7490", "#7c3aed", "#a16207", "#4d7c0f", "#f59e0b", "#475569",
)  # fmt: skip
_QUIET = "#5b6675"
_FEWER: dict[str, Any] = {"color": "#1c2430", "marker": "x", "markersize": 5, "linewidth": 1.2}
_COLUMNS = 3


def scatter(reports: Sequence[SharedReport], metric: str, higher_is_better: bool, path: Path) -> None:
    """Draw every run of every document that has the metric; a hollow mark is the speed-up that its work allows.

    The dense pipeline in fewer steps is a line of its own, the rivals of all methods.

    A picture that is equal to the dense one, whose PSNR has no end, stands at the panel's edge.

    Parameters
    ----------
    reports : sequence of SharedReport
    metric : str
    higher_is_better : bool
    path : Path
        Of the PNG.
    """
    from matplotlib.figure import Figure

    points = [point for report in reports for point in report.points() if metric in point.metrics]
    panels = list(dict.fromkeys((point.model, point.references) for point in points))
    methods = list(dict.fromkeys(point.method for point in points if point.kind != "fewer steps"))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns + 0.6, 4.0 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (model, references) in zip(grid.flat, panels, strict=False):
        here = [point for point in points if (point.model, point.references) == (model, references)]
        _panel(axes, here, methods, metric, higher_is_better)
        title = f"{model}, {references} reference{'s' * (references != 1)}"
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_xlabel("dense seconds over the run's own (hollow: the bound)")
        axes.set_ylabel(f"{metric}, {'higher' if higher_is_better else 'lower'} is nearer to dense", parse_math=False)
    marks = [_mark(axes, i, label=method) for i, method in enumerate(methods)]
    if any(point.kind == "fewer steps" for point in points):
        marks += axes.plot((), (), **_FEWER, label="fewer steps")
    legend = figure.legend(handles=marks, loc="outside lower center", ncols=3 * columns, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def on_frontier(reports: Sequence[SharedReport], metric: str) -> dict[int, list[tuple[float, float]]]:
    """By the number of references, FLOP ratio and metric of each run with this library, for `eval.frontier.figure`.

    Runs whose work is not known, and pictures that are equal to the dense one, are left out.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for point in (point for report in reports for point in report.points()):
        value = point.metrics.get(metric)
        if point.kind == "sparse" and point.flop_ratio is not None and value is not None:
            found.setdefault(point.references, []).append((point.flop_ratio, value))
    return found


def _panel(axes: Any, points: Sequence[Point], methods: Sequence[str], metric: str, higher_is_better: bool) -> None:
    known = [value for point in points if (value := point.metrics[metric]) is not None]
    spread = (max(known) - min(known) or 1.0) if known else 1.0
    edge = (max(known, default=0.0) + 0.15 * spread) if higher_is_better else min(known, default=0.0)

    def height(point: Point) -> float:
        value = point.metrics[metric]
        return edge if value is None else value

    for report in dict.fromkeys(point.report for point in points):
        fewer = sorted((p.speedup, height(p)) for p in points if (p.report, p.kind) == (report, "fewer steps"))
        axes.plot(*zip(*fewer, strict=True) if fewer else ((), ()), **_FEWER)
    for point in (point for point in points if point.kind != "fewer steps"):
        y, at = height(point), methods.index(point.method)
        if point.bound_speedup is not None:
            axes.plot([point.bound_speedup, point.speedup], [y, y], color=_QUIET, linewidth=0.8, zorder=1)
            _mark(axes, at, point.bound_speedup, y, markerfacecolor="white")
        _mark(axes, at, point.speedup, y)
    axes.axvline(1.0, color=_QUIET, linewidth=1, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)


def _mark(axes: Any, at: int, *place: float, **more: Any) -> Any:
    """One method's mark at (x, y), or nowhere."""
    x, y = place or ((), ())
    style = {"color": _COLOURS[at % len(_COLOURS)], "marker": "osD^v<>PhX*"[at % 11], "markersize": 5}
    return axes.plot(x, y, linestyle="", **style, **more)[0]
