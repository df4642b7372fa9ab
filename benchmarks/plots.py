"""Pictures of the rows: speed-up over the kept ratio and over references, each beside its bound, and memory.

    python -m benchmarks plots                     # PNG files of benchmarks/results/*_cpu.csv in benchmarks/plots
    python -m benchmarks plots --device cuda --out DIR

A picture is drawn for each CSV of whole pipelines that has rows for it; of each call and method the latest row counts.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_ref_attn.errors import ConfigError

from . import results

__all__ = ["PLOTS", "add_arguments", "draw", "latest", "run"]

STEMS = ("pipeline", "cache", "scaling", "end_to_end")
COLOURS = ("#1c2430", "#c2410c", "#0f766e", "#7c3aed", "#b45309", "#2563eb", "#be185d", "#4d7c0f")
QUIET = "#5b6675"

NAMES = {
    "kontext": "FLUX.1 Kontext", "flux2-dev": "FLUX.2 dev", "klein-4b": "FLUX.2 Klein 4B",
    "klein-9b": "FLUX.2 Klein 9B", "klein-9b-kv": "FLUX.2 Klein-KV 9B", "qwen-image-edit": "Qwen-Image-Edit",
    "qwen-image-edit-2511": "Qwen-Image-Edit-Plus 2511", "qwen-image-layered": "Qwen-Image-Layered",
    "longcat-image-edit": "LongCat-Image-Edit", "flux3": "FLUX.3", "fibo-edit": "FIBO-Edit",
    "joyimage-edit": "JoyImage-Edit", "joyimage-edit-plus": "JoyImage-Edit-Plus",
    "glm-image": "GLM-Image", "qwen-image-2.1": "Qwen-Image-2.1", "z-image-omni": "Z-Image-Omni",
    "ltx-2": "LTX-2",
}  # fmt: skip
"""Of `vocabulary.MODELS`, in words."""

AXES = {
    "side": "output and references, pixels a side", "batch": "pictures of one call", "references": "reference images",
}  # fmt: skip

METHODS = {
    "tokens": "tokens dropped at the input", "cache": "references stored and read", "both": "dropped, stored and read",
}  # fmt: skip
"""Legends of methods whose names say less."""

Row = Mapping[str, str]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each call and method the last row, by model and then by size."""
    columns = ("model", "depth", "steps", "references", "side", "batch", "method")
    last = {tuple(row[name] for name in columns): row for row in rows}.values()
    sizes = ("references", "side", "batch", "steps")
    return sorted(last, key=lambda row: (row["model"], *(int(row[name]) for name in sizes)))


def series(rows: Sequence[Row]) -> dict[str, list[tuple[float, Row]]]:
    """Rows of "<name> <share>%" by name, each with its share of the tokens in percent."""
    out: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        match = re.fullmatch(r"(.+) (\d+)%", row["method"])
        if match:
            out.setdefault(match[1], []).append((float(match[2]), row))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in out.items()}


def bound_speedup(row: Row) -> float:
    """Of the bound over the dense run of the row's own process."""
    return float(row["speedup"]) / float(row["measured_over_bound"])


def panels(rows: Sequence[Row], by: Sequence[str]) -> dict[str, list[Row]]:
    """Rows grouped by columns; the key says those that vary, and the model always."""
    varying = [name for name in by if name == "model" or len({row[name] for row in rows}) > 1]
    out: dict[str, list[Row]] = {}
    for row in rows:
        words = [NAMES.get(row["model"], row["model"])]
        words += [_counted(name, row[name]) for name in varying if name != "model"]
        out.setdefault(", ".join(words), []).append(row)
    return out


def _counted(column: str, value: str) -> str:
    """A size of the call in words: "1 reference", "512 x 512 pixels", "2 double and 1 single blocks"."""
    if column == "depth":
        double, single = value.split("+")
        return f"{double} double + {single} single-stream blocks"
    if column in ("side", "batch"):
        return f"{value} x {value} pixels" if column == "side" else f"batch of {value}"
    return f"{value} {column.removesuffix('s') if value == '1' else column}"


def _method(name: str) -> str:
    """A method in words, with its share if it has one."""
    first, *share = name.split(" ", 1)
    return ", ".join([METHODS.get(first, first), *share]) if first in METHODS else name


def over_kept(axes: Axes, rows: Sequence[Row]) -> bool:
    """Speed-up over the share of the reference tokens that is kept."""
    drawn = {name: points for name, points in series(rows).items() if len(points) > 1}
    for colour, (name, points) in zip(COLOURS, drawn.items(), strict=False):
        x = [share for share, _ in points]
        y = [float(row["speedup"]) for _, row in points]
        axes.plot(x, y, "o-", color=colour, label=_method(name), markersize=4)
        axes.plot(x, [bound_speedup(row) for _, row in points], "--", color=colour, linewidth=1)
    axes.set_xlabel("reference tokens kept, % of all")
    axes.set_xlim(left=0)
    return bool(drawn)


def over_references(axes: Axes, rows: Sequence[Row]) -> bool:
    """Speed-up over the number of references, at a quarter of the tokens and at the least that was run."""
    shares = sorted({share for points in series(rows).values() for share, _ in points})
    chosen = {f"{share:.0f}%" for share in [*shares[:1], 25.0]}
    return _lines(axes, rows, "references", lambda row: row["method"].split()[-1] in chosen)


def over_side(axes: Axes, rows: Sequence[Row]) -> bool:
    """Speed-up over the resolution."""
    return _lines(axes, rows, "side", lambda row: row["method"] != "dense")


def over_batch(axes: Axes, rows: Sequence[Row]) -> bool:
    """Speed-up over the batch."""
    return _lines(axes, rows, "batch", lambda row: row["method"] != "dense")


def _lines(axes: Axes, rows: Sequence[Row], column: str, wanted: Callable[[Row], bool]) -> bool:
    found: dict[str, list[Row]] = {}
    for row in filter(wanted, rows):
        found.setdefault(row["method"], []).append(row)
    found = {name: sorted(own, key=lambda row: int(row[column])) for name, own in found.items() if len(own) > 1}
    for colour, (name, own) in zip(COLOURS, found.items(), strict=False):
        x = [int(row[column]) for row in own]
        axes.plot(x, [float(row["speedup"]) for row in own], "o-", color=colour, label=_method(name), markersize=4)
        axes.plot(x, [bound_speedup(row) for row in own], "--", color=colour, linewidth=1)
    axes.set_xlabel(AXES[column])
    axes.set_xticks(sorted({int(row[column]) for own in found.values() for row in own}))
    return bool(found)


def memory(axes: Axes, rows: Sequence[Row]) -> bool:
    """Most memory of each method, weights included."""
    known = [row for row in rows if row["peak_mb"]]
    values = [float(row["peak_mb"]) / 1000 for row in known]
    axes.barh([row["method"] for row in known], values, color=COLOURS[0], height=0.6)
    for place, value in enumerate(values):
        axes.annotate(f"{value:.2f}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(right=1.15 * max(values, default=1.0))
    axes.set_xlabel("peak memory, GB (with weights)")
    return bool(known)


def cache_memory(axes: Axes, rows: Sequence[Row]) -> bool:
    """Reference keys and values that are held, beside those of every token."""
    known = [
        (share, row) for name, points in series(rows).items() if name in ("cache", "both") for share, row in points
    ]
    known = [(share, row) for share, row in known if float(row["cache_mb"] or 0)]
    for colour, name, size in zip(COLOURS, ("cache", "both"), (8, 4), strict=False):
        own = sorted((share, float(row["cache_mb"])) for share, row in known if row["method"].startswith(name))
        if own:
            axes.plot(*zip(*own, strict=True), "o-", color=colour, label=METHODS[name], markersize=size)
    if known:
        every = float(known[0][1]["dense_cache_mb"])
        axes.axhline(every, color=QUIET, linestyle=":", linewidth=1)
        axes.annotate("every token", (1, every), (-2, -3), xycoords=("axes fraction", "data"), ha="right", va="top",
                      textcoords="offset points", fontsize=8, color=QUIET)  # fmt: skip
    axes.set_xlabel("reference tokens kept, % of all")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return bool(known)


SPEED_UP = "speed-up of the whole call, x\n(dashed: the bound)"
PLOTS: dict[str, tuple[Callable[[Axes, Sequence[Row]], bool], tuple[str, ...], str]] = {
    "kept": (over_kept, ("model", "references", "side", "batch", "steps", "depth"), SPEED_UP),
    "references": (over_references, ("model", "side", "batch", "steps", "depth"), SPEED_UP),
    "side": (over_side, ("model", "references", "batch", "steps", "depth"), SPEED_UP),
    "batch": (over_batch, ("model", "references", "side", "steps", "depth"), SPEED_UP),
    "memory": (memory, ("model", "references", "side", "batch", "steps", "depth"), ""),
    "cache_memory": (cache_memory, ("model", "references", "side", "batch", "steps"), "reference K and V held, MB"),
}
"""Name -> what draws one panel and says whether there was anything to draw, the columns of a panel, its y axis."""

WIDE = 3  # panels in a row


def draw(rows: Sequence[Row], name: str) -> Figure | None:
    """One picture of the rows, a panel for each group of calls; None where no row has what it shows."""
    panel, by, label = PLOTS[name]
    figure, shown = Figure(layout="constrained", dpi=120), {}
    for title, own in panels(rows, by).items():
        axes = figure.add_subplot()
        if panel(axes, own):
            shown[title] = axes, own
        else:
            axes.remove()
    if not shown:
        return None
    wide, high = min(WIDE, len(shown)), -(-len(shown) // WIDE)
    figure.set_size_inches(4.2 * wide, 3.6 * high + 0.3)
    grid = figure.add_gridspec(high, wide)
    for place, (title, (axes, _)) in enumerate(shown.items()):
        axes.set_subplotspec(grid[place])
        axes.set_title(title.replace(", ", "\n", 1), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if label and place % wide == 0:
            axes.set_ylabel(label)
        if axes.get_legend_handles_labels()[0]:
            axes.set_ylim(0, 1.08 * max(max(line.get_ydata()) for line in _data_lines(axes)))
            axes.legend(fontsize=8, frameon=False)
        if label == SPEED_UP:
            axes.axhline(1, color=QUIET, linestyle=":", linewidth=1)
    where = "; ".join(dict.fromkeys(_where(row) for _, own in shown.values() for row in own))
    figure.supxlabel(textwrap.fill(where, 75 * wide), fontsize=7, color=QUIET)
    return figure


def _data_lines(axes: Axes) -> list[Any]:
    return [line for line in axes.get_lines() if len(line.get_ydata()) > 1]


def _where(row: Row) -> str:
    versions = f"torch {row['torch']}, {row['date']}, commit {row['commit']}"
    return f"{row['device']}, {row['threads']} threads, {row['dtype']}, {versions}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows, and where the pictures go."""
    parser.add_argument("--device", default="cpu", help="rows of this device (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=results.RESULTS, metavar="DIR", help="where the CSV files are")
    parser.add_argument("--out", type=Path, default=results.RESULTS.parent / "plots", metavar="DIR")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Every picture of every file that has rows for it."""
    written = []
    for stem in STEMS:
        path = options.results / f"{stem}_{options.device}.csv"
        rows = latest(results.known(path))
        for name in PLOTS:
            figure = draw(rows, name) if rows else None
            if figure is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                written.append(options.out / f"{path.stem}_{name}.png")
                figure.savefig(written[-1])
    if not written:
        raise ConfigError(f"plots need rows of whole pipelines, got none of {options.device} in {options.results}")
    print("\n".join(str(path) for path in written))
    return 0
