"""Runs the files of ``tests/ops/interpreted`` in a process whose kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))


def run(files: list[str], *args: str) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE / "interpreted" / file) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args, *paths]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = HERE.parents[1]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.early
def test_interpreted_kernels():
    done = run(FILES, "-m", "not slow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted_kernels_at_length(file: str):
    done = run([file], "-m", "slow")
    nothing_marked_slow = 5
    assert done.returncode in (0, nothing_marked_slow), done.stdout + done.stderr
