"""Rows of results: where and when they were measured, the CSV they go to, and back."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_ref_attn.eval.rows import Rows

__all__ = ["COLUMNS", "ENVIRONMENT", "RESULTS", "append", "environment", "known", "provenance", "read"]

RESULTS = Path(__file__).resolve().parent / "results"
ENVIRONMENT = (
    "date", "commit", "device", "torch", "diffusers", "python", "triton", "cuda", "load", "threads", "dtype",
)  # fmt: skip
COLUMNS = (
    *ENVIRONMENT, "model", "width", "depth", "steps", "references", "side", "batch", "method", "kept_mean",
    "seconds_median", "seconds_min", "seconds_max", "rounds", "flop_ratio", "full_flop_ratio", "bound_seconds",
    "measured_over_bound", "speedup", "host_ms_per_step", "peak_mb", "cache_mb", "dense_cache_mb", "gate",
    "dense_attention_seconds", "dense_remaining_seconds", "fixed_seconds", "scoring_seconds",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """Date, commit, device, and the versions that matter most."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
    }


def provenance(device: torch.device, dtype: str) -> dict[str, Any]:
    """What every row of a time must say: the environment, further versions, the load that was there, threads, dtype."""
    return environment(device) | {
        "python": platform.python_version(),
        "triton": _version("triton"),
        "cuda": f"{torch.version.cuda}, driver {_driver()}" if device.type == "cuda" else "",
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }


def append(rows: Sequence[Mapping[str, Any]], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to a CSV file, with a header if it is new.

    Raises
    ------
    ValueError
        If a row has a value without a column.
    ConfigError
        If the file has other columns.
    """
    Rows(path, columns, digits=4).add(rows)


def read(path: Path) -> list[dict[str, str]]:
    """Every row of a CSV file, oldest first."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def known(path: Path) -> list[dict[str, str]]:
    """As `read`; none where there is no file."""
    return read(path) if path.exists() else []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _told_by(*command: str) -> str:
    """The first line that a program prints; empty where there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    except FileNotFoundError:
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def _commit() -> str:
    commit = _told_by("git", "rev-parse", "--short", "HEAD")
    changed = _told_by("git", "status", "--porcelain", "--untracked-files=no", "--", "../sparse_ref_attn", "../csrc")
    return f"{commit}{'+' if changed else ''}" or "unknown"


def _driver() -> str:
    return _told_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


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
