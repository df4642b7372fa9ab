"""Regressions are found by ratios, and said in words; each planted one must be caught."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.check import TOLERANCE, compare
from benchmarks.cli import main
from sparse_ref_attn import ConfigError

COMMITTED = ("batch_cpu.csv", "cache_cpu.csv", "ops_cpu.csv", "pipeline_cpu.csv")
ROW = {"model": "m", "method": "edges 25%", "device": "d", "dtype": "float32", "measured_over_bound": "1.00"}


def copy(name: str, folder: Path, change: dict[str, float] | None = None) -> Path:
    """The committed rows of the newest of each call, with the last row's ratios multiplied by `change`."""
    rows = results.read(results.RESULTS / name)[-5:]
    for column, factor in (change or {}).items():
        rows[-1][column] = str(float(rows[-1][column]) * factor)
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_rows_are_no_slower_than_themselves(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["check", str(copy(name, tmp_path))]) == 0
    assert "0 fell by more than 10%; 0 rows have no committed row" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "column"), [("pipeline_cpu.csv", "measured_over_bound"), ("ops_cpu.csv", "of_hand")])
def test_a_planted_regression_is_found_and_named(name: str, column: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = copy(name, tmp_path, {column: 0.85})
    assert main(["check", str(path)]) == 1
    told = capsys.readouterr().out
    last = results.read(path)[-1]
    assert f"{last['method']}" in told
    assert f": {column} " in told
    assert "(-15%)" in told
    assert main(["check", str(path), "--tolerance", "0.2"]) == 0


def test_within_the_tolerance_is_no_regression():
    assert compare([ROW | {"measured_over_bound": 1.001 - TOLERANCE}], [ROW]).exit_code == 0
    assert compare([ROW | {"measured_over_bound": 0.999 - TOLERANCE}], [ROW]).exit_code == 1
    assert compare([ROW | {"measured_over_bound": float("nan")}], [ROW]).exit_code == 1


def test_seconds_are_not_compared():
    slow = {"seconds_median": 100.0, "bound_seconds": 100.0}
    assert compare([ROW | slow], [ROW | {"seconds_median": "1", "bound_seconds": "1"}]).exit_code == 0


def test_only_the_same_call_is_compared():
    for column, value in {"dtype": "bfloat16", "method": "edges 5%", "model": "n", "side": 512, "kept": 7}.items():
        found = compare([ROW | {column: value, "measured_over_bound": 0.1}], [ROW])
        assert (found.compared, found.alone, found.exit_code) == (0, 1, 1), column
    assert "nothing could be compared: none of 1 rows" in found.report()


def test_the_same_device_and_the_latest_row_count():
    other, old = ROW | {"device": "e", "measured_over_bound": "2.0"}, ROW | {"measured_over_bound": "3.0"}
    assert compare([ROW], [old, ROW, other]).exit_code == 0
    assert compare([ROW | {"device": "f"}], [ROW, other]).exit_code == 1


def test_bad_input(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"tolerance must lie in \[0, 1\), got 1"):
        compare([ROW], [ROW], 1.0)
    with pytest.raises(ConfigError, match=r"got .*none_cpu.csv, which does not exist"):
        main(["check", str(tmp_path / "none_cpu.csv")])
    with pytest.raises(ConfigError, match="fresh rows must be in a file of their own"):
        main(["check", str(results.RESULTS / "ops_cpu.csv")])


def test_a_run_checks_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The committed file is read before the run's own rows are appended to it."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    asked = ["ops", "--quick", "--kept", "0.25", "--rounds", "1", "--heads", "1", "--check"]
    assert main(asked) == 1
    assert "nothing could be compared" in capsys.readouterr().out
    path = tmp_path / "ops_cpu.csv"
    assert main([*asked, "--out", str(path)]) == 1
    rows = results.read(path)
    for committed, code in (("1e-9", 0), ("1e9", 1)):
        path.unlink()
        changed = [row | {"of_hand": committed, "of_bound": committed} for row in rows]
        results.append(changed, path, list(rows[0]))
        assert main(asked) == code
    assert "slower: gather_attention, forward, kontext" in capsys.readouterr().out
