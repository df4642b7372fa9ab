"""The benchmark of the ops runs, and its rows say what they should."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.bench_ops import COLUMNS, Call, append, main, refused
from benchmarks.op_shapes import MODELS, quick


def test_rows_of_a_quick_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = main(["--quick", "--kept", "0.25", "--rounds", "2", "--backward"])
    forward = {row["method"]: row for row in rows if row.get("direction") == "forward" and "tflops" in row}
    assert set(forward) == {"dense", "index_select + sdpa", "ours (auto)", "ours (sdpa)"}
    assert forward["ours (auto)"]["kept"] == 64
    assert forward["index_select + sdpa"]["of_hand"] == 1.0
    assert sum(row.get("direction") == "forward + backward" for row in rows) == 4
    assert "ours (triton): the backend must be able to do the call" in capsys.readouterr().out
    append(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_a_wrong_method_does_not_pass_its_gate() -> None:
    call = Call(quick(MODELS["kontext"]), 0.25, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert refused(call, lambda: call.ours("auto"), call.plain()) is None
        assert "allows" in str(refused(call, lambda: call.ours("auto") * 1.01, call.plain()))


def test_every_row_has_a_column() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert {shape.channels for shape in MODELS.values()} == {128}
