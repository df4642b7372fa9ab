"""The benchmarks run, and their rows say what the README of `benchmarks/` says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import bench_pipeline, results
from benchmarks.shapes import CASES

README = Path(results.__file__).with_name("README.md")


def test_every_column_is_explained_in_order():
    columns = [
        c.strip()
        for line in README.read_text().splitlines()
        if line.startswith("| ")
        for c in line[2:].split("|")[0].split(",")
    ]
    assert columns[1:] == list(results.COLUMNS)[: len(columns) - 1] == list(results.COLUMNS)


def test_rows_are_appended_under_one_header(tmp_path):
    row = results.environment(torch.device("cpu")) | {"method": "dense", "seconds_median": 1.23456789, "references": 4}
    for _ in range(2):
        results.append([row], tmp_path / "new" / "rows.csv")
    with (tmp_path / "new" / "rows.csv").open(encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first == second
    assert (first["seconds_median"], first["references"], first["bound_seconds"]) == ("1.235", "4", "")
    assert first["torch"] == torch.__version__
    with pytest.raises(ValueError, match="colour"):
        results.append([row | {"colour": 1}], tmp_path / "rows.csv")


def test_cases_have_real_token_counts():
    assert {case.side for case in CASES} == {1024}
    assert {(case.model, case.references) for case in CASES} == {
        ("kontext", 1), ("klein-9b", 1), ("klein-9b", 2), ("klein-9b", 4)
    }  # fmt: skip


@pytest.mark.slow
def test_a_quick_run_prints_a_row_a_method_beside_its_bound(capsys, tmp_path):
    bench_pipeline.main(
        ["--quick", "--model", "kontext", "--methods", "edges 25%", "ReCAST", "--out", str(tmp_path / "r")]
    )
    text = capsys.readouterr().out
    lines = text[text.index("method") :].splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:4]] == ["dense", "edges 25%", "ReCAST"]
    assert "of bound" in lines[0]
    assert not (tmp_path / "r").exists()
