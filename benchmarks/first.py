"""The first ten minutes on a card, in one command: is it right, is it safe, how fast is it.

    python -m benchmarks card                     # all of it, lines in results/card.jsonl
    python -m benchmarks card --cut --out DIR     # on a CPU, cut small: shows that it runs

It wants PyTorch, Triton and NumPy. What else it needs (pytest, pytest-xdist, hypothesis) it installs from a folder of
wheels, ``wheels`` in the checkout or beside it, into a folder of its own; without them the tests alone are left out. No
part imports diffusers. Every part is a process of its own with a share of the time: one that fails, hangs or is not
possible here takes nothing from the others. Every result is a JSON line, on disk as soon as it is known.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import results
from .lines import Lines
from .runner import carry_out

__all__ = ["CHECKS", "Check", "install", "run_all"]

ROOT = results.RESULTS.parent.parent
TESTS = ("tests/gpu/test_gather_attention.py", "tests/gpu/test_mass_rows.py")
NEEDED = ("pytest", "xdist", "hypothesis", "numpy")
WHEELS = {"xdist": "pytest-xdist"}

Found = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One part of the ten minutes.

    Parameters
    ----------
    name : str
    seconds : float
        Its share; what earlier parts leave over is added.
    command : tuple of str
        Arguments of ``python -m``.
    under : tuple of str
        A program and its arguments that it runs under; without that program the part is left out.
    environment : tuple of (str, str)
    needs : tuple of str
        Modules without which it is left out.
    reads : callable
        From a printed line to what it says, or None.
    optional : bool
        Whether a failure says nothing about the kernels.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    under: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()
    reads: Callable[[str], Found | None] = lambda line: None
    optional: bool = False


def _of_pytest(line: str) -> Found | None:
    failed = re.search(r"(?:FAILED|ERROR) (tests/\S+)|(tests/\S+) (?:FAILED|ERROR)", line)
    if failed and "%]" in line:
        return {"test": failed[1] or failed[2], "ok": False}
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", line)}
    return counts if counts and " in " in line else None


def _of_sanitizer(line: str) -> Found | None:
    told = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+)", line)
    if told:
        return {"errors": int(told[2]), "ok": told[2] == "0"}
    return {"fault": line.strip("= ")} if re.search(r"=+ (Invalid|Error: Race|Out-of)", line) else None


def _of_ncu(line: str) -> Found | None:
    """A row of ``ncu --csv --page details``: ..., "Kernel Name", ..., "Metric Name", "Metric Unit", "Metric Value"."""
    if line.startswith("==ERROR=="):  # performance counters are often kept from users
        return {"skipped": line.removeprefix("==ERROR==").strip()}
    cells = re.findall(r'"([^"]*)"', line)
    if len(cells) < 8 or "pipe_tensor" not in line:
        return None
    return {"kernel": cells[4], "metric": cells[-3], "percent": cells[-1]}


_CHILD = ("benchmarks.first_child",)
_SANITIZER = ("compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--tool")
_METRIC = "regex:^sm__(inst_executed_)?pipe_tensor.*avg.pct_of_peak_sustained_active"

CHECKS = (
    Check("environment", 30, (*_CHILD, "environment")),
    Check("outputs", 70, (*_CHILD, "outputs")),
    Check(
        "tests", 160, ("pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "-o", "addopts=", *TESTS),
        needs=("pytest", "hypothesis"), reads=_of_pytest,
    ),
    Check("times", 160, (*_CHILD, "times")),
    Check(
        "memcheck", 65, (*_CHILD, "gathers"), under=(*_SANITIZER, "memcheck"), reads=_of_sanitizer,
        # with PyTorch's own allocator a read beyond a tensor hits a block that it holds, and no fault is seen
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    ),
    Check("racecheck", 65, (*_CHILD, "gathers"), under=(*_SANITIZER, "racecheck"), reads=_of_sanitizer),
    Check(
        "tensor pipe", 50, (*_CHILD, "launches"), reads=_of_ncu, optional=True,
        under=("ncu", "--csv", "--metrics", _METRIC, "-k", "regex:forward|grad_q|grad_kv|gather_attention"),
    ),
)  # fmt: skip


def install(wheels: Path | None, site: Path) -> list[str]:
    """Put what is missing from a folder of wheels into `site`; what could not be had, in words.

    Each package by itself, without an index: one that does not fit takes no other with it.
    """
    site.mkdir(parents=True, exist_ok=True)
    told = []
    for module in NEEDED:
        package = WHEELS.get(module, module)
        if importlib.util.find_spec(module) is not None:
            continue
        if wheels is None:
            told.append(f"{package}: not installed, and there is no folder of wheels")
            continue
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--quiet", "--find-links", str(wheels)]
        done = subprocess.run([*command, "--target", str(site), package], capture_output=True, text=True, check=False)
        if done.returncode:
            told.append(f"{package}: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    return told


def find_wheels(given: Path | None) -> Path | None:
    """The folder that was named, else ``wheels`` in the checkout or beside it, else None."""
    return next((path for path in (given, ROOT / "wheels", ROOT.parent / "wheels") if path and path.is_dir()), None)


class _Reading:
    """A log that also turns what is printed into JSON lines."""

    def __init__(self, path: Path, lines: Lines, check: Check) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._lines, self._check = lines, check

    def write(self, text: str) -> int:
        found = self._check.reads(text)
        if found:
            self._lines.add(part=self._check.name, **found)
        return self._file.write(text)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def run_all(options: argparse.Namespace) -> int:
    """Every part, whatever becomes of the others; 1 where one failed, else 0."""
    began, out = time.monotonic(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    here = results.environment(torch.device("cpu" if options.cut else "cuda"))
    lines = Lines(out / "card.jsonl", commit=here["commit"], device=here["device"], cut=options.cut)
    site = out / "site"
    for told in install(find_wheels(options.wheels), site):
        lines.add(part="install", skipped=told)
    bad, ends = [], began + 60 * options.minutes
    for number, check in enumerate(CHECKS):
        later = sum(other.seconds for other in CHECKS[number + 1 :]) * options.minutes / 10
        code = _run(check, max(1.0, ends - time.monotonic() - later), lines, out, site, options.cut)
        if code not in (0, None) and not check.optional:
            bad.append(check.name)
    lines.add(part="all", failed=bad, seconds=round(time.monotonic() - began))
    return int(bool(bad))


def _run(check: Check, seconds: float, lines: Lines, out: Path, site: Path, cut: bool) -> int | None:
    """One part; its exit code, None where it was left out."""
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    missing = [m for m in check.needs if importlib.util.find_spec(m) is None and not (site / m).exists()]
    missing += [check.under[0]] if check.under and shutil.which(check.under[0]) is None else []
    if missing:
        lines.add(part=check.name, skipped=f"{', '.join(missing)} must be installed, and is not")
        return None
    command = [*check.under, sys.executable, "-m", *check.command]
    if check.command[0] == "pytest":
        parallel = importlib.util.find_spec("xdist") is not None or (site / "xdist").exists()
        command += ["-n", str(min(8, os.cpu_count() or 1))] if parallel else []
    else:
        command += ["--lines", str(lines.path), "--part", check.name, *(["--cut"] if cut else [])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), **dict(check.environment)}
    variables |= {"TRITON_INTERPRET": "1"} if cut else {}
    log = _Reading(out / f"card_{check.name.replace(' ', '_')}.log", lines, check)
    began = time.monotonic()
    try:
        code = carry_out([command], seconds, log, **variables)
    finally:
        log.close()
    lines.add(part=check.name, exit_code=code, seconds=round(time.monotonic() - began, 1))
    return code
