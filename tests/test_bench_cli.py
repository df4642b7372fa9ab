"""``sra bench``: the benchmarks of the checkout, with their exit code, and words where there is no checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.cli import LEVELS
from benchmarks.cli import main as benchmarks
from sparse_ref_attn.cli import benching, main

OPS = ["ops", "--quick", "--kept", "0.25", "--rounds", "1", "--heads", "1"]


def test_everything_behind_bench_is_the_benchmarks_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *OPS, "--models", "klein-9b"]) == 0
    assert "klein-9b, 1 heads, 1 references, 25% kept" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["bench", "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert not [level for level in LEVELS if level not in told]
    with pytest.raises(SystemExit):
        main(["bench", "pipeline", "--help"])
    assert "usage: sra bench pipeline" in capsys.readouterr().out


def test_the_exit_code_is_the_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = results.read(results.RESULTS / "pipeline_cpu.csv")[-4:]
    for row in rows:
        row["measured_over_bound"] = str(0.5 * float(row["measured_over_bound"]))
    results.append(rows, tmp_path / "pipeline_cpu.csv")
    assert main(["bench", "check", str(tmp_path / "pipeline_cpu.csv")]) == 1
    assert "slower: " in capsys.readouterr().out
    assert main(["bench", "check", str(tmp_path / "none.csv")]) == 2
    assert "sra: error: rows must be in a CSV file" in capsys.readouterr().err


def test_without_a_checkout_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benching, "ROOT", tmp_path)
    assert main(["bench", *OPS]) == 2
    told = capsys.readouterr().err
    assert "sra bench needs a checkout of the repository" in told
    assert "not part of the installed package" in told


def test_another_package_of_that_name_is_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "cli.py").write_text("")
    monkeypatch.setattr(benching, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["bench", *OPS]) == 2
    assert "benchmarks must be that of the checkout" in capsys.readouterr().err


def test_bad_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        benchmarks(["colour"])
    assert left.value.code == 2
    assert "invalid choice: 'colour'" in capsys.readouterr().err
