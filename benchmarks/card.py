"""Everything that needs a card: the first ten minutes in one command, and the long runs in parts.

    python -m benchmarks card                     # ten minutes, JSON lines: `first` says what
    python -m benchmarks card --list              # the long parts, what each does, and how long it should take
    python -m benchmarks card --part 6            # one of them, at most eight minutes
    python -m benchmarks card --part next         # the first that is not done for this commit
    python -m benchmarks card --cut --out DIR     # on a CPU, cut small: shows that it runs; so does --part 6 --cut

A part that runs out of time is stopped; the cases that it measured are written, and the same command goes on with the
others. What a part prints is also in ``part_<n>.log`` beside its rows, how it ended in ``parts.csv``. The minutes of
whole pipelines are arithmetic, their FLOPs at `RATE`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_ref_attn.errors import ConfigError

from . import first, results
from .runner import carry_out
from .shapes import SUITES

__all__ = ["PARTS", "Part", "add_arguments", "run"]

RATE = 4e14  # FLOP/s; a figure to plan with, not one that was measured
COLUMNS = ("date", "commit", "device", "part", "cut", "exit_code", "seconds")

Command = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Some commands that belong together.

    Parameters
    ----------
    about : str
        One line.
    commands : tuple of tuple of str
        Arguments of ``python -m``; "{out}" stands for the folder of the rows.
    cut : tuple of tuple of str
        The same, cut to what a CPU does in minutes.
    under : tuple of str
        A program and its arguments that the commands run under, except when cut.
    environment : tuple of (str, str)
        Variables of a cut run.
    """

    about: str
    commands: tuple[Command, ...]
    cut: tuple[Command, ...]
    under: Command = ()
    environment: tuple[tuple[str, str], ...] = ()

    def lines(self, out: Path, cut: bool) -> list[list[str]]:
        """The commands as they are run."""
        under = () if cut else self.under
        return [
            [*under, sys.executable, "-m", *(word.format(out=out) for word in command)]
            for command in (self.cut if cut else self.commands)
        ]

    def minutes(self) -> float | None:
        """What the FLOPs of its pipelines take at `RATE`; None where it runs none."""
        from .planning import pipeline_flops

        planned = [pipeline_flops(c[2:]) for c in self.commands if c[:2] == ("benchmarks", "pipeline")]
        return sum(planned) / RATE / 60 if planned else None


def measure(level: str, stem: str, about: str, full: Sequence[str], small: Sequence[str] = ()) -> Part:
    """A part that is one level of the benchmarks."""
    command = ("benchmarks", level, *full, "--device", "cuda", "--dtype", "bfloat16", "--resume")
    cut = ("benchmarks", level, *full, "--quick", "--rounds", "1", "--dtype", "float32", "--resume", *small)
    return Part(
        about,
        ((*command, "--out", f"{{out}}/{stem}_cuda.csv"),),
        ((*cut, "--device", "cpu", "--out", f"{{out}}/{stem}_cpu.csv"),),
    )


def pipelines(suite: str, about: str, *only: str) -> Part:
    """A part that is a suite of whole pipelines, or some of its cases; cut, two methods of each."""
    return measure(
        "pipeline", SUITES[suite].stem, about, ("--suite", suite, "--real-depth", *only),
        ("--blocks", "1", "--side", "128", "--methods", "edges 25%", "Klein-KV"),
    )  # fmt: skip


_TUNE = ("benchmarks", "tune", "--resume")
_TUNE_CUT = (
    *_TUNE, "--device", "cpu", "--dtype", "float16", "--channels", "32", "--kernels", "forward", "--queries", "40",
    "--kept", "20", "--bank", "30", "--heads", "1", "--candidates", "1", "--rounds", "1", "--out", "{out}/tune_cpu.csv",
)  # fmt: skip
_OPS_CUT = ("--models", "kontext", "--references", "1", "--kept", "0.25", "--heads", "1")

PARTS = (
    Part(
        "the GPU tests: float64 truth, repeated bits, whole pipelines",
        (("pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", "tests"),),
        (("pytest", "-m", "gpu", "-q", "tests/gpu"),),
    ),
    Part(
        "the kernels' GPU tests under compute-sanitizer: memory",
        (("pytest", "-m", "gpu", "-q", "-x", "tests/gpu/test_mass_rows.py"),),
        (("pytest", "-m", "gpu", "-q", "tests/gpu/test_mass_rows.py"),),
        ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "all"),
    ),
    Part(
        "every candidate configuration of the Triton kernels",
        ((*_TUNE, "--device", "cuda", "--out", "{out}/tune_cuda.csv"),),
        (_TUNE_CUT,),
        (),
        (("TRITON_INTERPRET", "1"),),
    ),
    measure("ops", "ops", "the ops forward, every model, 1 to 4 references",
            ("--models", "kontext", "flux2-dev", "klein-9b", "klein-4b", "qwen-edit", "--references", "1", "2", "4"),
            _OPS_CUT),
    measure("ops", "ops", "the ops forward and backward",
            ("--models", "kontext", "klein-9b", "--references", "1", "4", "--backward"), _OPS_CUT),
    measure("steps", "steps", "one step and one block of every named model",
            ("--models", "kontext", "flux2-dev", "klein-9b", "klein-4b", "qwen-image-edit", "--references", "1"),
            ("--models", "klein-4b", "--side", "128", "--kept", "0.25")),
    measure("host", "host", "what the library itself costs the CPU in a step", ("--rounds", "5")),
    pipelines("end-to-end", "Kontext at real size, 28 steps", "--model", "kontext"),
    pipelines("end-to-end", "Klein 9B at real size, 4 steps, 1 reference", "--model", "klein-9b", "--references", "1"),
    pipelines("end-to-end", "the same with 2 references", "--model", "klein-9b", "--references", "2"),
    pipelines("end-to-end", "the same with 3 references", "--model", "klein-9b", "--references", "3"),
    pipelines("end-to-end", "the same with 4 references", "--model", "klein-9b", "--references", "4"),
    pipelines("stored", "references stored in full steps and read in the others"),
    pipelines("step-cache", "step caches beside ours, and with ours"),
    pipelines("references", "scaling in references"),
    pipelines("kept", "scaling in the kept ratio"),
    pipelines("side", "scaling in resolution"),
    pipelines("batch", "scaling in the pipeline's own batch"),
    measure("batch", "batch", "items with references of their own", ("--real-depth",),
            ("--blocks", "1", "--side", "128")),
    Part(
        "pictures of the rows",
        (("benchmarks", "plots", "--device", "cuda", "--results", "{out}", "--out", "{out}/plots"),),
        (("benchmarks", "plots", "--device", "cpu", "--results", "{out}", "--out", "{out}/plots"),),
    ),
)  # fmt: skip


def done(state: Path, commit: str, device: str) -> set[int]:
    """The parts that ended well for this commit and device."""
    rows = results.known(state)
    return {
        int(row["part"])
        for row in rows
        if (row["commit"], row["device"], row["exit_code"]) == (commit, device, "0")
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which part (default: the first ten minutes), and where its rows go."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="the parts and how long each should take")
    what.add_argument("--part", metavar="N", help='a number of --list, or "next"')
    parser.add_argument("--cut", action="store_true", help="on a CPU at cut size: shows that the part runs")
    parser.add_argument("--minutes", type=float, help="it is stopped then (default: 8 for a part, 10 for all checks)")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="of what is missing; default: wheels, here or beside"
    )
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR", help="rows and logs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """One part, or the ten minutes; the exit code."""
    if options.list:
        for number, part in enumerate(PARTS):
            planned = part.minutes()
            told = "at most 8 min" if planned is None else f"{planned:.1f} min"
            print(f"{number:>3}  {told:<14}{part.about}")
        return 0
    if not options.cut and not torch.cuda.is_available():
        raise ConfigError("a part needs a CUDA device, got none; --cut shows on a CPU that it runs")
    if options.cut and options.out == results.RESULTS:
        raise ConfigError("--cut measures nothing: --out must name a folder other than benchmarks/results")
    options.minutes = options.minutes or (10.0 if options.part is None else 8.0)
    if options.part is None:
        return first.run_all(options)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    here = results.environment(torch.device("cpu" if options.cut else "cuda"))
    finished = done(out / "parts.csv", here["commit"], here["device"])
    number = _number(options.part, finished)
    if number is None:
        print(f"all {len(PARTS)} parts are done for commit {here['commit']} on {here['device']}")
        return 0
    part = PARTS[number]
    print(f"part {number}: {part.about}")
    began = time.monotonic()
    with (out / f"part_{number}.log").open("a", encoding="utf-8") as log:
        variables = dict(part.environment) if options.cut else {}
        code = carry_out(part.lines(out, options.cut), 60 * options.minutes, log, **variables)
    row = {name: here[name] for name in ("date", "commit", "device")}
    row |= {"part": number, "cut": options.cut, "exit_code": code, "seconds": round(time.monotonic() - began)}
    results.append([row], out / "parts.csv", COLUMNS)
    return code


def _number(text: str, finished: set[int]) -> int | None:
    if text == "next":
        return next((number for number in range(len(PARTS)) if number not in finished), None)
    if not (text.isdecimal() and int(text) < len(PARTS)):
        raise ConfigError(f'--part must be "next" or a number from 0 to {len(PARTS) - 1}, got {text!r}')
    return int(text)
