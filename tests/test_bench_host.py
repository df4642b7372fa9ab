"""The library's own CPU time in a step, apart from the model's."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_host
from benchmarks.cli import main


@torch.no_grad()
def test_each_step_is_compared_with_an_unpatched_one_on_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patched call of all tokens, and the unpatched one of those that the step ran."""
    rows: list[int] = []
    timed = bench_host._cpu_seconds

    def noting(transformer: Any, kwargs: Mapping[str, Any]) -> float:
        rows.append(kwargs["hidden_states"].shape[1])
        return timed(transformer, kwargs)

    monkeypatch.setattr(bench_host, "_cpu_seconds", noting)
    monkeypatch.setattr(bench_host, "STEPS", 3)
    found = bench_host.bench(1, 1, torch.device("cpu"), torch.float32)
    kinds = {(row["method"], row["step"]): row["samples"] for row in found}
    assert kinds["every token", "dense"] == kinds["tokens 25%", "sparse"] == 3
    assert kinds["stored", "cached"] == kinds["stored, 25% read per tile", "cached"] == 2
    assert kinds["stored, 25% read per tile", "profile"] == 1
    by_run = [rows[i : i + 6] for i in range(0, len(rows), 6)]
    assert by_run[0] == [128] * 6
    assert by_run[2] == [128, 80] * 3  # 16 of 64 tokens
    assert all(run == [128, 128, 128, 64, 128, 64] for run in by_run[4:])


def test_the_command_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "host.csv"
    threads = torch.get_num_threads()
    try:
        assert main(["host", "--quick", "--rounds", "1", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == set(bench_host.METHODS)
    assert all(float(row["quarter"]) <= float(row["cpu_ms_of_library"]) <= float(row["three_quarters"]) for row in rows)
    assert "library ms" in capsys.readouterr().out
