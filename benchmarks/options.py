"""The arguments that all benchmarks share, and what they do before anything is timed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_ref_attn.eval.clock import timed

from . import check, results
from .memory import keep_freed_memory

__all__ = ["Output", "add_cuts", "add_shared", "prepare"]


def add_shared(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Where it runs, how often, and where the rows go."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float16", "float32"], default=dtype,
        help="auto: the faster of bfloat16 and float32 here (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of every method instead of the case's")
    parser.add_argument("--quick", action="store_true", help="cut small: shows that it runs; writes rows only to --out")
    parser.add_argument("--out", type=Path, metavar="CSV", help="rows are appended to it; default benchmarks/results/")
    parser.add_argument(
        "--check", action="store_true",
        help="compare measured over bound with the committed rows; the exit code is 1 where it fell",
    )  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=check.TOLERANCE, help="of --check (default: %(default)s)")
    parser.add_argument(
        "--resume", action="store_true", help="pass over cases whose rows of this commit and device --out has"
    )


def add_cuts(parser: argparse.ArgumentParser) -> None:
    """Overrides of a case's size."""
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps instead of the case's")
    parser.add_argument("--side", type=int, metavar="PIXELS", help="of output and references instead of the case's")
    parser.add_argument("--blocks", type=int, metavar="N", help="blocks of each kind instead of the case's")
    parser.add_argument("--real-depth", action="store_true", help="every block of the published model")


def prepare(options: argparse.Namespace) -> torch.device:
    """No page faults, and a dtype in place of "auto"; the device that was asked for."""
    device = torch.device(options.device)
    if device.type == "cpu" and not keep_freed_memory():
        print("the allocator returns memory between operations: large dense operations pay for page faults")
    if options.dtype == "auto":
        options.dtype = faster_dtype(device)
    return device


def faster_dtype(device: torch.device) -> str:
    """bfloat16, unless this CPU multiplies it no faster than float32 (that is, emulates it)."""
    if device.type != "cpu":
        return "bfloat16"
    times = {}
    for name in ("bfloat16", "float32"):
        x, w = (torch.randn(n, 3072).to(getattr(torch, name)) for n in (1024, 3072))
        times[name] = min(timed(lambda x=x, w=w: x @ w.T, device)[0] for _ in range(4))
    print(", ".join(f"{name} {2 * 1024 * 3072**2 / t / 1e9:.0f} GFLOP/s" for name, t in times.items()))
    return min(times, key=lambda name: times[name])


class Output:
    """Where a benchmark's rows go: case by case, so that an interrupted run keeps what it has.

    Parameters
    ----------
    options : argparse.Namespace
        Of `add_shared`.
    stem : str
        The file is ``results/<stem>_<device>.csv`` unless ``--out`` names another.
    columns : sequence of str
    """

    def __init__(self, options: argparse.Namespace, stem: str, columns: Sequence[str]) -> None:
        self._options, self._columns = options, columns
        device = torch.device(options.device)
        committed = results.RESULTS / f"{stem}_{device.type}.csv"
        self._path = options.out or committed
        self._committed = results.known(committed) if options.check else []
        self._writes = not options.quick or options.out is not None
        self._here = results.provenance(device, options.dtype)
        self.rows: list[Mapping[str, Any]] = []

    def has(self, **case: Any) -> bool:
        """Whether ``--resume`` was given and rows of this case, commit and device are there."""
        if not self._options.resume:
            return False
        wanted = {name: str(value) for name, value in case.items()}
        wanted |= {name: str(self._here[name]) for name in ("commit", "device", "dtype")}
        found = any(wanted.items() <= row.items() for row in results.known(self._path))
        if found:
            print(f"  {', '.join(wanted.values())}: rows are there, passed over")
        return found

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of one case."""
        told = [self._here | dict(row) for row in rows]
        self.rows.extend(told)
        if self._writes:
            results.append(told, self._path, self._columns)

    def verdict(self) -> int:
        """The exit code: 0, or 1 where ``--check`` found that something got slower, in words."""
        if not self._options.check:
            return 0
        found = check.compare(self.rows, self._committed, self._options.tolerance)
        print(found.report())
        return found.exit_code
