"""The plots of ``RESULTS.md``, a PNG each beside the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .measured import Measured, Term, read
from .studies import caches, direction, sparse_context, sweep

__all__ = ["PLOTS", "draw"]

COLOURS = ("#1c2430", "#c2410c", "#2563eb", "#15803d", "#9333ea", "#b45309")
QUIET = "#5b6675"
PSNR = "subject PSNR against the answer (dB)"
TASKS = {
    "place": "subject placed elsewhere", "pair": "two references", "swap": "background swapped",
    "local": "subject recoloured", "global": "all recoloured",
}  # fmt: skip
TRAININGS = {"dense": "trained dense", "control": "600 steps more", "drop": "600 steps more, dropping"}


def draw(folder: Path) -> list[Path]:
    """Draw every plot whose rows there are, into the same folder."""
    from matplotlib.figure import Figure

    made = []
    for name, (study, _, paint) in PLOTS.items():
        measured = read(folder, study)
        if measured is None:
            continue
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        paint(measured, figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(f"The small model, {measured.rows[0]['steps']} steps, held-out subjects; bars: 95 % intervals",
                         fontsize=8, color=QUIET)  # fmt: skip
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=110, metadata={"Software": None})
    return made


def _curve(
    axes: Any, measured: Measured, what: str | Sequence[Term], at: Mapping[float, Mapping[str, object]], **style: Any
) -> None:
    """Means with their intervals of a metric, or of a sum of terms, over x; what was not measured is left out."""
    terms = (Term(1.0, what, {}),) if isinstance(what, str) else what
    points = [
        (x, measured.interval([replace(term, where=where) for term in terms]))
        for x, where in sorted(at.items(), key=lambda point: point[0])
    ]
    known = [(x, each) for x, each in points if each is not None]
    if known:
        low = [each.mean - each.low for _, each in known]
        high = [each.high - each.mean for _, each in known]
        axes.errorbar(
            [x for x, _ in known], [each.mean for _, each in known], yerr=[low, high], marker="o", markersize=4,
            linewidth=1.3, capsize=2, **style,
        )  # fmt: skip


def _level(axes: Any, measured: Measured, metric: str, where: Mapping[str, object]) -> None:
    dense = measured.interval([Term(1.0, metric, where)])
    if dense is not None:
        axes.axhline(dense.mean, color=QUIET, linewidth=1, linestyle=":")
        axes.annotate("every token", (0.99, dense.mean), (0, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", fontsize=8, color=QUIET)  # fmt: skip


def _where(method: str, keep: float, **more: object) -> dict[str, object]:
    return {"model": "dense", "task": "place", "method": method, "keep": keep, **more}


def _methods(measured: Measured, figure: Any) -> None:
    axes = figure.add_subplot()
    names = [name for name in measured.distinct("method") if name != "dense"]
    keep = max(float(row["keep"]) for row in measured.rows if row["method"] != "dense")
    found = {name: measured.interval([Term(1.0, "subject_psnr", _where(name, keep))]) for name in names}
    known = sorted(((each, name) for name, each in found.items() if each is not None), key=lambda pair: pair[0].mean)
    for y, (each, name) in enumerate(known):
        axes.errorbar(each.mean, y, xerr=[[each.mean - each.low], [each.high - each.mean]], fmt="o", capsize=2,
                      color=COLOURS[1 if name.startswith("ReCAST") else 0])  # fmt: skip
    axes.set_yticks(range(len(known)), [name for _, name in known])
    dense = measured.interval([Term(1.0, "subject_psnr", _where("dense", 1.0))])
    if dense is not None:
        axes.axvline(dense.mean, color=QUIET, linewidth=1, linestyle=":", label="every token")
        axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel(PSNR)


def _sweep(measured: Measured, figure: Any) -> None:
    for axes, metric, label in _side_by_side(figure, "subject_psnr", "identity"):
        for colour, method in zip(COLOURS, sweep.RULES, strict=False):
            at = {100 * keep: _where(method, keep) for keep in sweep.KEEPS}
            _curve(axes, measured, metric, at, color=colour, label=method)
        _level(axes, measured, metric, _where("dense", 1.0))
        axes.set_xscale("log", base=2)
        axes.set_xticks([100 * keep for keep in sweep.KEEPS], [f"{100 * keep:g}" for keep in sweep.KEEPS])
        axes.set_xlabel("reference tokens kept after step 0, % of all")
        axes.set_ylabel(label)
    figure.axes[0].legend(frameon=False, fontsize=8)


def _direction(measured: Measured, figure: Any) -> None:
    for axes, keep in zip(figure.subplots(1, len(direction.KEEPS), sharey=True), direction.KEEPS, strict=True):
        for colour, ranked in zip(COLOURS, ("mass", "exact mask"), strict=False):
            at = {float(x): _where(f"{ranked}, {way}", keep) for x, way in enumerate(_WAYS)}
            _curve(axes, measured, "subject_psnr", at, color=colour, label=f"ranked by the {ranked}")
        axes.set_xticks(range(3), _WAYS)
        axes.set_xlabel(f"budget over the steps, {100 * keep:g} % of the tokens on average")
    figure.axes[0].set_ylabel(PSNR)
    figure.axes[0].legend(frameon=False, fontsize=8)


_WAYS = ("rising", "flat", "falling")


def _entropy(measured: Measured, figure: Any) -> None:
    steps = range(int(measured.rows[0]["steps"]))
    left, right = figure.subplots(1, 2)
    left.axhline(0, color=QUIET, linewidth=1, linestyle=":")
    for colour, task in zip(COLOURS, measured.distinct("task"), strict=False):
        at = {float(step): {"task": task, "step": step, "block": "single"} for step in steps}
        _curve(
            left, measured, (Term(1.0, "bits", {}), Term(-1.0, "uniform_bits", {})), at, color=colour, label=TASKS[task]
        )
        _curve(right, measured, "top_25", at, color=colour)
    left.set_ylabel("entropy of the references' attention,\nbits above that of a uniform one")
    right.set_ylabel("share of the attention\nin the top 25 % of the tokens (0 to 1)")
    for axes in (left, right):
        axes.set_xlabel("step")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")


def _blocks(measured: Measured, figure: Any) -> None:
    steps = range(int(measured.rows[0]["steps"]))
    blocks = [name for name in measured.distinct("block") if name.isdigit()]
    for axes, metric, title in zip(
        figure.subplots(1, 2),
        ("bits", "recall"),
        ("entropy of the attention (bits)", "share of the subject's tokens found (0 to 1)"),
        strict=True,
    ):
        grid = [
            [_mean(measured, metric, {"task": "place", "step": step, "block": block}) for step in steps]
            for block in blocks
        ]
        shown = axes.imshow(grid, aspect="auto", cmap="viridis")
        figure.colorbar(shown, ax=axes)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("block (0 and 1 double-stream)")


def _stability(measured: Measured, figure: Any) -> None:
    steps = int(measured.rows[0]["steps"])
    for axes, metric, title in zip(
        figure.subplots(1, 2),
        ("spearman", "overlap_25"),
        ("rank correlation (Spearman)", "overlap of the top 25 % (0 to 1)"),
        strict=True,
    ):
        grid = [
            [
                1.0 if a == b else _mean(measured, metric, {"kind": "step", "a": min(a, b), "b": max(a, b)})
                for b in range(steps)
            ]
            for a in range(steps)
        ]
        shown = axes.imshow(grid, cmap="viridis", vmax=1.0)
        figure.colorbar(shown, ax=axes)
        axes.set_title(f"rankings of two steps:\n{title}", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("step")


def _reuse(measured: Measured, figure: Any) -> None:
    axes = figure.add_subplot()
    names = [name for name in measured.distinct("method") if name != "dense"]
    keep = float(next(row["keep"] for row in measured.rows if row["method"] != "dense"))
    at = {float(x): _where(name, keep) for x, name in enumerate(names)}
    _curve(axes, measured, "subject_psnr", at, color=COLOURS[0], linestyle="none")
    _level(axes, measured, "subject_psnr", _where("dense", 1.0))
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.set_ylabel(PSNR)


def _caches(measured: Measured, figure: Any) -> None:
    axes = figure.add_subplot()
    groups = {"cache alone": list(caches.CACHES), "ours alone": list(caches.OURS)}
    groups["both"] = [f"{ours} + {cache}" for ours in caches.OURS for cache in caches.CACHES]
    for colour, (label, names) in zip(COLOURS, groups.items(), strict=False):
        points = []
        for name in names:
            where = _where(name, 1.0 if label == "cache alone" else caches.KEEP)
            found = [measured.interval([Term(1.0, metric, where)]) for metric in ("flop_ratio", "subject_psnr")]
            if found[0] is not None and found[1] is not None:
                points.append((found[0].mean, found[1].mean))
                if label != "both":
                    axes.annotate(name, points[-1], (5, -12 if name.endswith("3") else 5), textcoords="offset points",
                                  fontsize=8)  # fmt: skip
        axes.scatter(*zip(*points, strict=True) if points else ([], []), color=colour, label=label, zorder=3)
    _level(axes, measured, "subject_psnr", _where("dense", 1.0))
    axes.set_xlabel("dense FLOPs / the run's FLOPs, transformer")
    axes.margins(0.12)
    axes.set_ylabel(PSNR)
    axes.legend(frameon=False, fontsize=8)


def _tuned(measured: Measured, figure: Any) -> None:
    figure.set_size_inches(9.0, 6.0)
    panels = figure.subplots(len(sparse_context.TASKS), len(sparse_context.MODELS), sharex=True, sharey="row")
    for task, row in zip(sparse_context.TASKS, panels, strict=True):
        for model, axes in zip(sparse_context.MODELS, row, strict=True):
            for colour, rule in zip(COLOURS, sparse_context.RULES, strict=False):
                at = {100 * keep: _where(rule, keep, task=task, model=model) for keep in sparse_context.KEEPS}
                at[100.0] = _where("dense", 1.0, task=task, model=model)
                _curve(axes, measured, "subject_psnr", at, color=colour, label=rule)
            axes.set_xscale("log")
            axes.set_xticks([5, 10, 25, 100], ["5", "10", "25", "100"], minor=False)
            axes.set_title(f"{TASKS[task]},\n{TRAININGS[model]}", fontsize=9)
        row[0].set_ylabel(PSNR)
    for axes in panels[-1]:
        axes.set_xlabel("reference tokens kept, % of all")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right upper")


def _tasks(measured: Measured, figure: Any) -> None:
    axes = figure.add_subplot()
    names = [name for name in measured.distinct("method") if name != "dense"]
    tasks = measured.distinct("task")
    for i, (colour, name) in enumerate(zip(COLOURS, names, strict=False)):
        at = {}
        for x, task in enumerate(tasks):
            keep = float(next(row["keep"] for row in measured.rows if row["method"] == name))
            at[x + 0.12 * (i - (len(names) - 1) / 2)] = _where(name, keep, task=task)
        _curve(axes, measured, "psnr", at, color=colour, linestyle="none", label=name)
    at = {float(x): _where("dense", 1.0, task=task) for x, task in enumerate(tasks)}
    _curve(axes, measured, "psnr", at, color=QUIET, linestyle="none", label="every token")
    axes.set_xticks(range(len(tasks)), [TASKS[task].replace(" ", "\n", 1) for task in tasks])
    axes.set_ylabel("PSNR of the picture\nagainst the answer (dB)")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")


def _side_by_side(figure: Any, *metrics: str) -> Iterator[tuple[Any, str, str]]:
    labels = {"subject_psnr": PSNR, "identity": "likeness of the subject,\ncosine of MobileNetV2 features"}
    for axes, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        yield axes, metric, labels[metric]


def _mean(measured: Measured, metric: str, where: Mapping[str, object]) -> float:
    values = list(measured.values(metric, where).values())
    return sum(values) / len(values) if values else float("nan")


PLOTS: dict[str, tuple[str, str, Callable[[Measured, Any], None]]] = {
    "methods": ("methods", "subject PSNR of each method at ReCAST's budget", _methods),
    "sweep": ("sweep", "quality over the share kept", _sweep),
    "direction": ("direction", "rising, flat and falling budgets", _direction),
    "entropy": ("mass", "entropy and mass share over the steps", _entropy),
    "blocks": ("mass", "entropy and recall by block and step", _blocks),
    "stability": ("stability", "likeness of the rankings of two steps", _stability),
    "reuse": ("reuse", "quality by where the ranking comes from", _reuse),
    "caches": ("caches", "quality over executed work, with and without step caches", _caches),
    "tasks": ("tasks", "quality by task", _tasks),
    "sparse_context": ("sparse_context", "quality over the share kept, by model and rule", _tuned),
}
"""By file name: the study, what it shows, and who paints it."""
