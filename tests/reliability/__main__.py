"""Runs the long reliability tests and appends what they counted to ``benchmarks/results/reliability.csv``.

python -m tests.reliability                         # all of them
python -m tests.reliability -k configurations       # a part of them, by pytest's -k
python -m tests.reliability --untimed               # on a machine that does other things too: no seconds in the rows
python -m tests.reliability --trial 0 1234          # trial 1234 of seed 0 again, alone
python -m tests.reliability --other fibo 0 12       # the same of a pipeline with a call of its own

A row is written as soon as its test has passed, and a test whose row of this commit is there is not run again: broken
off, the command goes on where it was. A failed test writes no row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.results import append, environment, known

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.csv"
COLUMNS = (
    "date", "commit", "device", "torch", "diffusers", "test", "count", "ran", "detail", "resident_start",
    "resident_end", "tensors_start", "tensors_end", "objects_start", "objects_end", "seconds",
)  # fmt: skip

__all__ = ["COLUMNS", "Rows", "main"]


class Rows:
    """A pytest plugin: one CSV row for each passed slow test, and none of them twice.

    Parameters
    ----------
    path : Path
        The CSV file.
    timed : bool
        Whether the rows say how long a test took.
    """

    def __init__(self, path: Path, timed: bool) -> None:
        self.path, self.timed = path, timed
        self.environment = environment(torch.device("cpu"))
        self.done = {row["test"] for row in known(path) if row["commit"] == self.environment["commit"]}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        waiting = [item for item in items if _name(item.nodeid) not in self.done]
        config.hook.pytest_deselected(items=[item for item in items if item not in waiting])
        items[:] = waiting

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # now, and not in hours
            print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)
        if report.when != "call" or not report.passed:
            return
        row: dict[str, Any] = {**self.environment, "test": _name(report.nodeid), **dict(report.user_properties)}
        if self.timed:
            row["seconds"] = report.duration
        append([row], self.path, COLUMNS)


def _name(nodeid: str) -> str:
    return nodeid.removeprefix("tests/reliability/")


def main(arguments: list[str]) -> int:
    """Run the command; what pytest returned."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description="The long reliability tests.")
    parser.add_argument("-k", metavar="EXPRESSION", help="only these tests (pytest's -k)")
    parser.add_argument("--untimed", action="store_true", help="leave the seconds out of the rows")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="the CSV file")
    parser.add_argument("--trial", nargs=2, type=int, metavar=("SEED", "INDEX"), help="one trial, alone")
    parser.add_argument("--other", nargs=3, metavar=("NAME", "SEED", "INDEX"), help="one of an other pipeline")
    given = parser.parse_args(arguments)
    if given.trial or given.other:
        from tests.reliability.other_trials import OtherTrial
        from tests.reliability.trials import Trial

        name, seed, index = given.other or (None, *given.trial)
        trial = Trial(seed, index) if name is None else OtherTrial(name, int(seed), int(index))
        print(trial.kind, trial.run(), *trial.notes, sep="\n  ")
        return 0
    chosen = ["-k", given.k] if given.k else []
    plugin = Rows(given.rows, not given.untimed)
    return int(pytest.main(["-m", "slow", "-q", str(Path(__file__).parent), *chosen], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
