"""A comparison as rows, one a method: numbers, and the same as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .comparison import Comparison
from .equal_time import Rivals
from .metrics import Metric

__all__ = ["Row", "cells", "markdown", "rows_of"]

Row = dict[str, Any]


def rows_of(results: Mapping[str, Comparison], metrics: Sequence[Metric], rivals: Rivals | None = None) -> list[Row]:
    """One row a method, dense first, the others by time, the longest first: steps, tokens, seconds, bound, and each
    metric against the dense picture.

    Parameters
    ----------
    results : mapping of str to Comparison
        By method, of `compare_all` with dense runs.
    metrics : sequence of Metric
    rivals : Rivals, optional
        Runs in fewer steps and under step caches, which have rows of their own and no bound.
    """
    first = next(iter(results.values()))
    assert first.dense is not None
    rows: list[Row] = [
        {
            "method": "dense",
            "steps": len(first.handle.record.steps),
            "tokens_a_step": first.handle.record.layout.reference_tokens,
            "seconds": first.dense.whole,
            "speedup": 1.0,
            "bound_seconds": None,
            "bound_speedup": None,
            "measured_over_bound": None,
            "flop_ratio": 1.0,
            "at_equal_time": None,
            **dict.fromkeys(metric.name for metric in metrics),
        }
    ]
    for name, result in results.items():
        record = result.handle.record
        rows.append(
            {
                "method": name,
                "steps": len(record.steps),
                "tokens_a_step": sum(record.mean_kept(step) for step in record.steps) / len(record.steps),
                "seconds": result.sparse.whole,
                "speedup": result.speedup,
                "bound_seconds": result.bound_seconds,
                "bound_speedup": result.bound_speedup,
                "measured_over_bound": result.measured_over_bound,
                "flop_ratio": result.flop_ratio,
                "at_equal_time": None if rivals is None else rivals.equal[name],
                **{metric.name: metric(result.sparse_image, result.dense_image) for metric in metrics},
            }
        )
    dense = rows[0]
    for name, run in ({} if rivals is None else rivals.runs).items():
        assert rivals is not None
        measured = {
            "method": name,
            "steps": run.steps,
            "tokens_a_step": run.tokens,
            "seconds": run.seconds,
            "speedup": dense["seconds"] / run.seconds,
            "flop_ratio": rivals.flop_ratio(name),
            "at_equal_time": rivals.equal.get(name),
        }
        seen = {metric.name: metric(run.image, first.dense_image) for metric in metrics}
        rows.append({**dict.fromkeys(dense), **measured, **seen})
    return [dense, *sorted(rows[1:], key=lambda row: -row["seconds"])]


def markdown(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """The rows as a markdown table."""
    header, body = cells(rows, metrics)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def cells(rows: Sequence[Row], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """The table's header and its lines, as text."""
    header = ["method", "steps", "reference tokens a step", "seconds", "speed-up", "bound", "measured / bound"]
    header += ["fewer steps in no more time"]
    header += [f"{metric.name} {'↑' if metric.higher_is_better else '↓'}" for metric in metrics]
    out = []
    for row in rows:
        line = [str(row["method"]), str(row["steps"]), f"{row['tokens_a_step']:,.0f}", f"{row['seconds']:.3g}"]
        line += [f"{row['speedup']:.2f}x", _number(row["bound_speedup"], ".2f", "x")]
        line += [_number(row["measured_over_bound"], ".2f"), row["at_equal_time"] or ""]
        out.append(line + [_number(row[metric.name], ".4g") for metric in metrics])
    return header, out


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
