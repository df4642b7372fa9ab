"""The frontier as a figure: what is lost over the work that is saved, numbered, beside fewer steps alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...candidates import DENSE
from ...frontier import Point
from ...vocabulary import OPEN_SCENERY
from .listed import setting_of
from .table import grouped, speed

__all__ = ["best_of", "figure"]

REFERENCES = (1, 2, 4)
MEASURES = {
    "subject": "subject against the answer, dB beside\nthe dense run (below 0: lost)",
    "picture": "PSNR to the dense\npicture, dB",
    "scenery": "contrast of open scenery, dB beside\nthe dense run (below 0: not drawn)",
}
"""The rows of panels; the last only where it was measured."""
_INK, _QUIET, _FEWER, _OURS, _MEASURED = "#1c2430", "#b6bec9", "#1d4ed8", "#c2410c", "#15803d"
Key = tuple[str, int, int]
Place = tuple[float, float]


def figure(
    points: Sequence[Point],
    path: Path,
    *,
    model: str = "kontext",
    base: int | None = None,
    measured: Mapping[int, Sequence[Place]] | None = None,
) -> list[str]:
    """Draw all settings of one base, those that no other beats numbered; the numbers' names.

    Quality is that of edits with as many references, or with the most that were measured, in the worst kind of edit.

    Parameters
    ----------
    points : sequence of Point
    path : Path
        Of the PNG.
    model : str
        A published model's name, at whose sizes the work is.
    base : int, optional
        Steps of the dense run; default the number with the most settings.
    measured : mapping of int to sequence of (float, float), optional
        By the number of references, what was measured elsewhere: dense FLOPs over the run's own, and the PSNR to the
        dense picture, which stand beside the settings' own.

    Returns
    -------
    list of str
        What stands at 1, 2, ...
    """
    from matplotlib.figure import Figure

    settings = grouped(points)
    bases = [each for *_, each in settings]
    base = max(sorted(set(bases)), key=bases.count) if base is None else base
    own = {key: found for key, found in settings.items() if key[2] == base}
    measures = [name for name in MEASURES if any(_value(point, name) is not None for point in points)]
    places = {
        (measure, count): {
            key: (speed(key, model, count), value)
            for key, found in own.items()
            if (value := _worst(found, measure, count)) is not None
        }
        for measure in measures
        for count in REFERENCES
    }
    best = {panel: best_of(where) for panel, where in places.items()}
    shown = {key for keys in best.values() for key in keys if key[0] != DENSE}
    numbered = sorted(shown, key=lambda key: speed(key, model, REFERENCES[-1]))
    drawn = Figure(figsize=(10.5, 3.3 * len(measures) + 0.17 * (len(numbered) // 3 + 1)), layout="constrained")
    panels = drawn.subplots(len(measures), len(REFERENCES), sharex="col", sharey="row", squeeze=False)
    for i, measure in enumerate(measures):
        for j, count in enumerate(REFERENCES):
            _panel(panels[i][j], places[measure, count], best[measure, count], numbered)
            if measured and measure == "picture":
                _mark(panels[i][j], measured, count)
        panels[i][0].set_ylabel(MEASURES[measure], fontsize=9)
    for axes, count in zip(panels[0], REFERENCES, strict=True):
        axes.set_title(f"{count} reference{'s' * (count > 1)}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel(f"dense FLOPs / the setting's, {model}", fontsize=9)
    names = [_name(key) for key in numbered]
    rows = -(-len(names) // 3)
    lines = ["     ".join(f"{k + 1:>2} {names[k]:<34}" for k in range(row, len(names), rows)) for row in range(rows)]
    drawn.supxlabel("\n".join(lines), fontsize=7.5, family="monospace", ha="left", x=0.04)
    drawn.savefig(path, dpi=110, metadata={"Software": None})
    return names


def best_of(places: Mapping[Key, Place]) -> list[Key]:
    """The settings that no other beats: none is as fast and better, or as good and faster; slowest first.

    Examples
    --------
    >>> best_of({("a", 1, 2): (1.5, 30.0), ("b", 1, 2): (1.6, 31.0), ("c", 1, 2): (2.0, 20.0)})
    [('b', 1, 2), ('c', 1, 2)]
    """
    found: list[Key] = []
    highest = float("-inf")
    for key in sorted(places, key=lambda each: (-places[each][0], -places[each][1], each)):
        if places[key][1] > highest:
            highest = places[key][1]
            found.append(key)
    return found[::-1]


def _panel(axes: Any, places: Mapping[Key, Place], best: Sequence[Key], numbered: Sequence[Key]) -> None:
    low, high = _limits([y for _, y in places.values()])
    others = [place for key, place in places.items() if key[0] != DENSE]
    axes.plot(*zip(*others, strict=True), "o", color=_QUIET, markersize=3, zorder=1) if others else None
    fewer = sorted((place, key) for key, place in places.items() if key[0] == DENSE)
    if fewer:
        axes.plot(*zip(*(place for place, _ in fewer), strict=True), "s-", color=_FEWER, markersize=4, linewidth=1.4,
                  label="fewer steps, every token", zorder=2)  # fmt: skip
        for (x, y), (_, steps, _) in fewer:
            if y > low:
                axes.annotate(str(steps), (x, y), (0, -11), textcoords="offset points", fontsize=7, color=_FEWER,
                              ha="center")  # fmt: skip
    for key in best:
        if key[0] != DENSE:
            x, y = places[key]
            axes.plot(x, y, "o", color=_OURS, markersize=5, zorder=3)
            axes.annotate(str(numbered.index(key) + 1), (x, y), (3, 4), textcoords="offset points", fontsize=8,
                          color=_INK)  # fmt: skip
    axes.axhline(0, color=_INK, linewidth=0.6, linestyle=":") if low < 0 < high else None
    axes.set_ylim(low, high)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if fewer:
        axes.legend(fontsize=7, frameon=False, loc="best", handlelength=1.6)


def _mark(axes: Any, measured: Mapping[int, Sequence[Place]], count: int) -> None:
    """What was measured elsewhere with so many references; the height is that of the row, which all panels share."""
    heights = [y for places in measured.values() for _, y in places]
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, min(heights) - 1), max(high, max(heights) + 1))
    if places := measured.get(count):
        axes.plot(*zip(*places, strict=True), "D", color=_MEASURED, markersize=5, label="measured elsewhere", zorder=4)
        axes.legend(fontsize=7, frameon=False, loc="best", handlelength=1.6)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """So that what is far below the best half does not press it flat."""
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    low = max(ordered[0], middle - 1.5 * (ordered[-1] - middle) - 1)
    return low - 0.08 * (ordered[-1] - low) - 0.05, ordered[-1] + 0.1 * (ordered[-1] - low) + 0.05


def _value(point: Point, measure: str) -> float | None:
    """One of `MEASURES`; scenery that is open is a picture of its own, which nothing else is compared with."""
    if (point.family == OPEN_SCENERY) != (measure == "scenery"):
        return None
    return point.dense_db if measure == "picture" else point.loss_db


def _worst(points: Sequence[Point], measure: str, references: int) -> float | None:
    """The lowest of the kinds of edit with so many references, or the most that there are below it."""
    there = {p: value for p in points if p.references <= references and (value := _value(p, measure)) is not None}
    most = max((p.references for p in there), default=0)
    return min((value for p, value in there.items() if p.references == most), default=None)


def _name(key: Key) -> str:
    name, steps, base = key
    assert setting_of(name) is not None
    return name if steps == base else f"{name}, {steps} of {base} steps"
