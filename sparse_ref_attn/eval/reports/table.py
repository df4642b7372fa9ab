"""Points of many documents as rows: a CSV file, and a markdown table ordered by time."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .reading import Point, SharedReport

__all__ = ["as_csv", "as_markdown", "metrics_of"]

_MEASURED = ("method", "kind", "steps", "seconds", "speedup", "bound_speedup", "flop_ratio", "drift")


def metrics_of(reports: Sequence[SharedReport]) -> dict[str, bool]:
    """Every metric that any of them has, in the order of the first that has it, and whether higher is better."""
    found: dict[str, bool] = {}
    for report in reports:
        found |= {name: higher for name, higher in report.metrics.items() if name not in found}
    return found


def as_csv(reports: Sequence[SharedReport]) -> str:
    """A line a run, dense ones too, with device, weights and versions; empty where something is not known."""
    metrics = list(metrics_of(reports))
    columns = ["file", "model", "pipeline", "weights", "dtype", "device", "torch", "diffusers", "sparse-ref-attn"]
    columns += ["date", "repeats", "references", "reference_tokens", "output", "method", "kind", "steps", "settings"]
    columns += ["seconds", "speedup", "bound_speedup", "flop_ratio", "drift", *metrics]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for report in reports:
        own = _constant(report)
        writer.writerow(
            own
            | {"method": "dense", "kind": "dense", "seconds": report.dense_seconds, "speedup": 1.0, "flop_ratio": 1.0}
        )
        settings = report.about.get("methods", {})
        for point in report.points():
            measured = {name: value for name, value in asdict(point).items() if name in _MEASURED}
            writer.writerow(own | measured | {"settings": settings.get(point.method, "")} | point.metrics)
    return buffer.getvalue()


def _constant(report: SharedReport) -> dict[str, Any]:
    about, call = report.about, report.document["call"]
    versions = about["versions"]
    return {
        "file": report.path.name,
        "model": about["model"] or "",
        "pipeline": about["pipeline"],
        "weights": (about["transformer"]["weights"] or "")[:16],
        "dtype": about["transformer"]["dtype"],
        "device": about["device"],
        **{name: versions.get(name) for name in ("torch", "diffusers", "sparse-ref-attn")},
        "date": about["date"],
        "repeats": about["repeats"],
        "references": len(about["references"]),
        "reference_tokens": sum(call["reference_tokens"]),
        "output": "x".join(map(str, call["output"])),
        "steps": about["arguments"]["steps"],
    }


def as_markdown(reports: Sequence[SharedReport]) -> str:
    """One table for each file: every run by time, the longest first; above it model, device and sizes, and first of all
    whether fewer steps win."""
    return "\n\n".join(_one(report) for report in reports)


def _one(report: SharedReport) -> str:
    about, metrics = report.about, report.metrics
    known = _constant(report)
    references = f"{known['references']} reference{'s' * (known['references'] != 1)}"
    transformer = f"{about['transformer']['dtype']}, weights {known['weights'] or 'unknown'}"
    head = (
        f"**{_plain(report.path.name)}**: {_plain(report.model)} ({_plain(transformer)}), {references} of "
        f"{known['reference_tokens']:,} tokens, {known['output']} pixels, {known['steps']} steps; "
        f"{_plain(about['device'])}, torch {_plain(str(known['torch']))}, {known['date']}"
    )
    if report.fewer_steps_win:
        beaten = ", ".join(map(_plain, report.fewer_steps_win))
        head = (
            f"**All tokens in fewer steps are nearer to the dense picture than {beaten}, in no more time.**\n\n{head}"
        )
    columns = ["method", "steps", "seconds", "speed-up", "bound", "FLOP ratio", "drift, worst"]
    columns += [f"{name} {'↑' if higher else '↓'}" for name, higher in metrics.items()]
    lines = [head, "", _line(columns), "|---|" + "--:|" * (len(columns) - 1)]
    timed = [(point.seconds, _cells(point, metrics)) for point in report.points()]
    timed.append(
        (
            report.dense_seconds,
            ["dense", str(known["steps"]), f"{report.dense_seconds:.3g}", "1.00x", *[""] * (len(columns) - 4)],
        )
    )
    lines += [_line(cells) for _, cells in sorted(timed, key=lambda row: -row[0])]
    return "\n".join(lines)


def _cells(point: Point, metrics: Mapping[str, bool]) -> list[str]:
    likeness = ["equal" if (value := point.metrics[name]) is None else f"{value:.4g}" for name in metrics]
    ratios = ["" if value is None else f"{value:.2f}x" for value in (point.bound_speedup, point.flop_ratio)]
    drift = "" if point.drift is None else f"{point.drift:.2g}"
    return [point.method, str(point.steps), f"{point.seconds:.3g}", f"{point.speedup:.2f}x", *ratios, drift, *likeness]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Of a stranger's file: no line and no cell ends in it."""
    return " ".join(text.replace("|", "/").split())
