"""Rows of results: where and when they were measured, the CSV they go to, the table they make."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["COLUMNS", "append", "environment", "table"]

COLUMNS = (
    "date", "commit", "device", "torch", "diffusers", "threads", "dtype", "model", "width", "depth", "steps",
    "references", "method", "kept_mean", "seconds_median", "seconds_min", "seconds_max", "rounds", "flop_ratio",
    "bound_seconds", "measured_over_bound", "speedup", "host_ms_per_step", "gate", "dense_attention_seconds",
    "dense_remaining_seconds", "fixed_seconds", "scoring_seconds",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """What every row must say: date, commit, device, versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
    }


def append(rows: Sequence[dict[str, Any]], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The speed-ups of one case as text, each beside its bound."""
    dense = rows[0]
    lines = [
        f"dense: {dense['dense_attention_seconds']:.2f} s attention, {dense['dense_remaining_seconds']:.2f} s other "
        f"transformer, {dense['fixed_seconds']:.2f} s outside it",
        f"{'method':<14}{'kept':>7}{'seconds':>9}  {'min-max':<14}{'FLOP ratio':>11}{'bound':>8}{'speed-up':>10}"
        f"{'of bound':>10}{'host ms/step':>14}",
    ]
    for row in rows:
        spread = f"{row['seconds_min']:.2f}-{row['seconds_max']:.2f}"
        lines.append(
            f"{row['method']:<14}{row['kept_mean']:>7.0f}{row['seconds_median']:>9.2f}  {spread:<14}"
            f"{row['flop_ratio']:>11.2f}{dense['seconds_median'] / row['bound_seconds']:>8.2f}{row['speedup']:>10.2f}"
            f"{row['measured_over_bound']:>10.2f}{row['host_ms_per_step']:>14.2f}"
        )
    return "\n".join(lines)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    """The CPU's model name as Linux tells it, with family and model number where the name says little."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    return (
        f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family')}, model {facts.get('model')})"
    )
