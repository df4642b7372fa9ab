"""The table of `results/host_cpu.csv`: what the library itself costs the CPU in a step."""

from __future__ import annotations

from pathlib import Path

from .results import read

__all__ = ["host"]


def host(path: Path) -> str:
    """Markdown with a line for each method and kind of step, of the latest rows."""
    latest = {(row["method"], row["step"]): row for row in read(path)}
    lines = [
        "| method | step | unpatched, ms | library, ms | half of the samples |",
        "|---|---|--:|--:|--:|",
    ]
    for (method, step), row in latest.items():
        unpatched, own, low, high = (
            f"{float(row[name]):.1f}" for name in ("cpu_ms_unpatched", "cpu_ms_of_library", "quarter", "three_quarters")
        )
        lines.append(f"| {method} | {step} | {unpatched} | {own} | {low} to {high} |")
    where = {f"{r['device']}, torch {r['torch']}, {r['date']}, commit {r['commit']}": 0 for r in latest.values()}
    return "\n".join([*lines, "", *(f"- {each}" for each in where)])
