"""The benchmarks run, and their rows say what the README of `benchmarks/` says."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_batch, bench_cache, bench_pipeline, pipelines, results
from benchmarks.shapes import CACHE_QUICK, CASES
from sparse_ref_attn import SparseRef, estimate
from sparse_ref_attn.adapters.geometries import named_model

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


def test_the_reference_caches_benchmark_prints_each_execution_beside_its_bound(monkeypatch, capsys, tmp_path):
    def narrow(name: str, **settings: Any) -> torch.nn.Module:
        return named_model(name, **settings, num_attention_heads=2, joint_attention_dim=64)

    monkeypatch.setattr(pipelines, "named_model", narrow)
    out = tmp_path / "rows.csv"
    case = replace(CACHE_QUICK[1], steps=3)
    monkeypatch.setattr(bench_cache, "CACHE_CASES", [case])
    try:
        bench_cache.main(["--dtype", "float32", "--out", str(out)])
    finally:
        torch.set_grad_enabled(True)
    with out.open(encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows)[:2] == ["dense", "tokens 50%"]
    assert len(rows) == 10
    assert [rows[f"{execute} 25%"]["kept_mean"] for execute in ("tokens", "cache", "both")] == ["128", "256", "128"]
    for execute in ("tokens", "cache", "both"):
        size = (case.side, case.side)
        whole = estimate(
            named_model("klein-9b"),
            references=[size] * 2,
            output=size,
            steps=3,
            config=SparseRef("edges", 0.1, execute),
        )
        assert float(rows[f"{execute} 10%"]["full_flop_ratio"]) == pytest.approx(whole.flop_ratio, rel=1e-3)
    assert float(rows["both 10%"]["cache_mb"]) < float(rows["both 50%"]["cache_mb"])
    assert "of bound" in capsys.readouterr().out


@pytest.mark.slow
def test_a_quick_batch_prints_its_methods_beside_the_bound(capsys, tmp_path):
    bench_batch.main(["--quick", "--model", "kontext", "--out", str(tmp_path / "r")])
    text = capsys.readouterr().out
    lines = text[text.index("method") :].splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:4]] == ["one by one", "batch", "padded"]
    assert "of bound" in lines[0]
    assert not (tmp_path / "r").exists()
