"""A program of a test tells how it ended, and what its environment is."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests import programs


def fails_as_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("this one")
    time.sleep(600)


def test_one_that_fails_ends_the_other(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ValueError: this one"):
        programs.run_pair(fails_as_rank_1, folder=tmp_path)


def tells() -> int:
    print(os.environ.get("COLOUR"), "diffusers" in sys.modules)  # imported by the server
    return int(os.environ["CODE"])


def test_the_exit_code_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOUR", "red")
    assert programs.run(tells, log=tmp_path / "log", CODE="0") == "red True\n"
    monkeypatch.delenv("COLOUR")
    with pytest.raises(AssertionError, match="None True"):
        programs.run(tells, log=tmp_path / "other", CODE="3")
