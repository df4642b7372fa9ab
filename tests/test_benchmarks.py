"""The benchmarks run, and their rows say what the README of `benchmarks/` says."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_pipeline, bench_steps, random_pipelines, results, runs
from benchmarks.cli import LEVELS, main
from benchmarks.memory import peak_of
from benchmarks.methods import FEWER, METHODS
from benchmarks.shapes import QUICK_TEXT_TOKENS, SUITES, PipelineCase
from sparse_ref_attn import ConfigError, SparseRef, estimate, patched
from sparse_ref_attn.cost import StepTokens, run_flops
from sparse_ref_attn.eval.counted import counted_work
from sparse_ref_attn.models import adapter_for, named_model
from sparse_ref_attn.report.work import recorded_flops
from sparse_ref_attn.vocabulary import MODELS

README = Path(results.__file__).with_name("README.md")
CPU = torch.device("cpu")
QUICK = ["--quick", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def one_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    """How sure the cost of timing is does not matter."""
    monkeypatch.setattr(bench_pipeline, "TAPS", 1)


def rows_in(path: Path) -> dict[str, dict[str, str]]:
    return {row["method"]: row for row in results.read(path)}


def test_every_column_is_explained_in_order():
    section = README.read_text().split("\n## Columns of")[1].split("\n## ")[0]
    columns = [
        c.strip() for line in section.splitlines() if line.startswith("| ") for c in line[2:].split("|")[0].split(",")
    ]
    assert columns[1:] == list(results.COLUMNS)


def test_every_level_stands_in_the_readme():
    text = README.read_text()
    assert not [level for level in LEVELS if f"python -m benchmarks {level}" not in text]


def test_rows_are_appended_under_one_header(tmp_path):
    row = results.provenance(CPU, "float32") | {"method": "dense", "seconds_median": 1.23456789, "references": 4}
    for _ in range(2):
        results.append([row], tmp_path / "new" / "rows.csv")
    first, second = results.read(tmp_path / "new" / "rows.csv")
    assert first == second
    assert (first["seconds_median"], first["references"], first["bound_seconds"]) == ("1.235", "4", "")
    assert first["torch"] == torch.__version__
    with pytest.raises(ValueError, match="colour"):
        results.append([row | {"colour": 1}], tmp_path / "rows.csv")
    with pytest.raises(ConfigError, match="must have the columns date, method, got date, commit"):
        results.append([row], tmp_path / "new" / "rows.csv", ("date", "method"))


def test_every_row_says_where_it_comes_from():
    here = results.provenance(CPU, "float32")
    assert tuple(here) == results.ENVIRONMENT
    assert {"python", "triton", "threads", "load"} <= {name for name, value in here.items() if value != ""}
    stems = {"ops", "steps", "batch", *(suite.stem for suite in SUITES.values())}
    for path in (path for path in results.RESULTS.glob("*.csv") if path.stem.rpartition("_")[0] in stems):
        with path.open(encoding="utf-8") as file:
            assert tuple(csv.DictReader(file).fieldnames or ())[: len(here)] == results.ENVIRONMENT, path.name
        for row in results.read(path):
            assert row["device"], path.name
            assert row["commit"], path.name


GEOMETRIES = {case.model for case in SUITES["geometries"].cases}


def test_suites_have_real_shapes():
    assert {case.side for case in SUITES["pipeline"].cases} == {1024}
    assert {(case.model, case.references) for case in SUITES["pipeline"].cases} == {
        ("kontext", 1), ("klein-9b", 1), ("klein-9b", 2), ("klein-9b", 4)
    }  # fmt: skip
    named = {model.removesuffix("-kv") for model in MODELS}  # with other processors, of the same size
    assert len(GEOMETRIES) >= 6
    assert named >= GEOMETRIES
    assert [case.references for case in SUITES["references"].cases] == [1, 2, 3, 4, 6, 8]
    assert {(case.model, case.references, case.steps) for case in SUITES["end-to-end"].cases} == {
        ("kontext", 1, 28), *(("klein-9b", n, 4) for n in (1, 2, 3, 4))
    }  # fmt: skip
    for suite in SUITES.values():
        assert set(suite.methods) <= {*METHODS, FEWER}
        assert all(case.heads is None for case in suite.cases)
    for case in {(case.model, case.layers, case.single): case for case in SUITES["end-to-end"].cases}.values():
        cut, whole = random_pipelines.transformer_of(case).config, named_model(case.model).config
        assert dict(cut) == dict(whole)


def test_references_are_different_pictures():
    assert len({photo.tobytes() for photo in random_pipelines.photos(8, 64)}) == 8
    with pytest.raises(ValueError, match="8 different references, got 9"):
        random_pipelines.photos(9, 64)


def tiny(model: str = "klein-9b", **changes: Any) -> PipelineCase:
    return replace(
        PipelineCase(model, references=1, layers=1, single=1, steps=2, side=128, heads=2, text_tokens=32), **changes
    )


@pytest.mark.parametrize("model", ["kontext", "klein-9b"])
def test_counted_work_is_that_of_the_shapes(model: str):
    case = tiny(model)
    pipe = random_pipelines.build(case, CPU, torch.float32)
    with torch.no_grad(), counted_work(pipe.transformer) as work:
        random_pipelines.caller(pipe, case)()
    shape = adapter_for(pipe.transformer).shape(pipe.transformer)
    assert work() == run_flops(shape, [StepTokens(case.text_tokens, 64, 64)] * 2)


@torch.no_grad()
def test_the_work_of_kleins_own_cache_is_that_of_ours_with_every_token():
    case = tiny(references=2, steps=3)
    pipe = random_pipelines.with_cache(random_pipelines.build(case, CPU, torch.float32))
    with patched(pipe, SparseRef("grid", 1.0, "cache")) as handle:
        random_pipelines.caller(pipe, case)()
    shape = adapter_for(pipe.transformer).shape(pipe.transformer)
    dense = runs.Runs([1.0], [1.0], [0.5])
    plain, kv = runs.rows_of(case, {"dense": dense, "Klein-KV": runs.Runs([1.0])}, pipe.transformer)
    full = run_flops(shape, [StepTokens(case.text_tokens, 64, 128)] * 3)
    assert kv["flop_ratio"] == pytest.approx(full.total / recorded_flops(shape, handle.record).total)
    assert (plain["flop_ratio"], plain["measured_over_bound"]) == (1.0, 1.0)
    assert 0 < kv["bound_seconds"] < 1


def test_peak_memory_is_what_is_held_at_once():
    def call() -> None:
        for _ in range(3):
            first = torch.zeros(1 << 20, dtype=torch.uint8)
            del first
        second, third = torch.zeros(1 << 20, dtype=torch.uint8), torch.zeros(1 << 19, dtype=torch.uint8)
        del second, third

    assert peak_of(call, CPU) == (1 << 20) + (1 << 19)


def test_the_reference_caches_suite_puts_each_execution_beside_its_bound(capsys, tmp_path):
    out = tmp_path / "rows.csv"
    methods = ["tokens 25%", "cache 25%", "both 25%", "both 5%", "Klein-KV"]
    asked = ["pipeline", "--suite", "cache", "--references", "2", *QUICK, "--side", "128", "--steps", "3"]
    asked += ["--out", str(out), "--methods", *methods]
    assert main(asked) == 0
    rows = rows_in(out)
    assert list(rows) == ["dense", *methods]
    assert [rows[f"{execute} 25%"]["kept_mean"] for execute in ("tokens", "cache", "both")] == ["32", "64", "32"]
    size = (128, 128)
    whole = estimate(
        named_model("klein-9b-kv"), references=[size] * 2, output=size, steps=3, text_tokens=QUICK_TEXT_TOKENS,
        config=SparseRef("edges", 0.05, "both"),
    )  # fmt: skip
    assert float(rows["both 5%"]["full_flop_ratio"]) == pytest.approx(whole.flop_ratio, rel=1e-3)
    assert float(rows["both 5%"]["cache_mb"]) < float(rows["both 25%"]["cache_mb"])
    assert float(rows["tokens 25%"]["peak_mb"]) < float(rows["dense"]["peak_mb"]) < float(rows["Klein-KV"]["peak_mb"])
    for row in rows.values():
        assert float(row["measured_over_bound"]) > 0
        assert (row["side"], row["batch"], row["dtype"]) == ("128", "1", "float32")
    assert "of bound" in capsys.readouterr().out
    assert main([*asked, "--resume"]) == 0
    assert "rows are there, passed over" in capsys.readouterr().out
    assert len(results.read(out)) == len(rows)


def test_the_stored_suite_counts_each_step_as_it_ran(tmp_path):
    out = tmp_path / "rows.csv"
    methods = ["stored", "stored once", "isolated", "stored once, 25% read", "stored, tiles"]
    asked = ["pipeline", "--suite", "stored", "--model", "klein-9b", "--references", "2", *QUICK, "--side", "128"]
    asked += ["--steps", "4"]
    assert main([*asked, "--out", str(out), "--methods", *methods]) == 0
    rows = rows_in(out)
    assert list(rows) == ["dense", *methods]
    ratio = {name: float(row["full_flop_ratio"]) for name, row in rows.items()}
    assert 1 < ratio["stored"] < ratio["stored once"] < ratio["stored once, 25% read"]
    size = (128, 128)
    for name in ("stored once", "isolated"):
        config = METHODS[name].config
        whole = estimate(
            named_model("klein-9b"), references=[size] * 2, output=size, steps=4, text_tokens=QUICK_TEXT_TOKENS,
            config=config,
        )  # fmt: skip
        assert ratio[name] == pytest.approx(whole.flop_ratio, rel=1e-3)
    assert float(rows["isolated"]["flop_ratio"]) > 1.1 * float(rows["stored"]["flop_ratio"])
    tiles = rows["stored, tiles"]
    assert float(tiles["flop_ratio"]) > float(rows["stored"]["flop_ratio"])
    assert float(tiles["scoring_seconds"]) > 0
    assert float(rows["stored once, 25% read"]["cache_mb"]) < float(rows["stored once"]["cache_mb"])


def test_step_caches_are_charged_the_work_they_do(tmp_path):
    out = tmp_path / "rows.csv"
    names = ["TaylorSeer", "TaylorSeer + edges 25%", "TaylorSeer + stored once", "FirstBlockCache", "cache-dit"]
    asked = ["pipeline", "--suite", "step-cache", "--model", "kontext", *QUICK, "--side", "128", "--steps", "5"]
    asked += ["--blocks", "1"]
    assert main([*asked, "--out", str(out), "--methods", "edges 25%", *names, FEWER]) == 0
    rows = rows_in(out)
    fewer = [row for name, row in rows.items() if name.startswith("dense, ")]
    assert fewer
    for row in fewer:
        assert float(row["flop_ratio"]) == pytest.approx(5 / int(row["method"].split()[1]), rel=1e-3)
        assert row["steps"] == "5"  # of the run that it is compared with
    ratio = {name: float(row["flop_ratio"]) for name, row in rows.items()}
    assert 1 < ratio["TaylorSeer"] < ratio["TaylorSeer + edges 25%"]
    assert ratio["edges 25%"] < ratio["TaylorSeer + edges 25%"]
    assert ratio["TaylorSeer + stored once"] > 1  # the cache begins anew after the full step
    assert ratio["FirstBlockCache"] >= 1
    assert ratio["cache-dit"] >= 1


def test_kontext_end_to_end_at_cut_size_and_a_method_that_it_cannot_run(capsys, tmp_path):
    out = tmp_path / "rows.csv"
    asked = ["pipeline", "--suite", "end-to-end", "--model", "kontext", *QUICK, "--side", "128", "--out", str(out)]
    assert main([*asked, "--methods", "tokens 25%", "Klein-KV"]) == 0
    assert "Klein-KV: kontext has no pipeline that keeps its references' keys and values" in capsys.readouterr().out
    rows = rows_in(out)
    assert {row["depth"] for row in rows.values()} == {"1+1"}
    assert list(rows) == ["dense", "tokens 25%"]
    with pytest.raises(ConfigError, match=r"must name a case of cache .*klein-9b with 4.*, got none"):
        main(["pipeline", "--suite", "cache", "--model", "kontext", *QUICK])


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(GEOMETRIES | {"klein-9b-kv"}))
def test_every_named_model_runs(model: str, tmp_path):
    out = tmp_path / "rows.csv"
    asked = ["pipeline", "--suite", "geometries", "--model", model, *QUICK, "--side", "128"]
    assert main([*asked, "--methods", "edges 25%", "--out", str(out)]) == 0
    assert list(rows_in(out)) == ["dense", "edges 25%"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["kontext", "klein-9b"])
def test_end_to_end_at_cut_depth(model: str, tmp_path):
    """The real width: 256 pixels, one block of each kind."""
    out = tmp_path / "rows.csv"
    asked = ["pipeline", "--suite", "end-to-end", "--model", model, "--references", "1", "--blocks", "1"]
    asked += ["--side", "256", "--steps", "2", "--rounds", "1", "--methods", "tokens 25%", "cache 25%", "both 25%"]
    assert main([*asked, "--out", str(out)]) == 0
    rows = rows_in(out)
    assert len(rows) == (2 if model == "kontext" else 4)
    for row in rows.values():
        assert float(row["bound_seconds"]) > 0
        assert float(row["peak_mb"]) > 0


def test_a_step_and_its_blocks(tmp_path):
    out = tmp_path / "rows.csv"
    asked = ["steps", "--models", "klein-4b", *QUICK, "--side", "128", "--rounds", "1", "--kept", "0.25"]
    assert main([*asked, "--out", str(out)]) == 0
    rows = results.read(out)
    assert [row["level"] for row in rows] == ["step"] * 3 + ["double block"] * 2 + ["single block"] * 2
    step, profile = rows[1], rows[2]
    assert (step["method"], step["kept"], profile["method"], profile["kept"]) == ("grid 25%", "16", "profile", "64")
    joint, kept = QUICK_TEXT_TOKENS + 128, QUICK_TEXT_TOKENS + 80
    single = rows[-1]
    model = random_pipelines.transformer_of(tiny("klein-4b"))
    linears = [m for m in model.single_transformer_blocks[0].modules() if isinstance(m, torch.nn.Linear)]
    macs = sum(m.in_features * m.out_features for m in linears)
    pairs = 2 * model.config.num_attention_heads * model.config.attention_head_dim
    work = [n * macs + n * n * pairs for n in (joint, kept)]
    assert float(single["flop_ratio"]) == pytest.approx(work[0] / work[1], rel=1e-3)
    assert float(profile["flop_ratio"]) == 1.0


def test_the_first_block_of_each_kind_is_timed_with_its_own_attention():
    model = random_pipelines.transformer_of(tiny("klein-4b"), CPU, torch.float32)
    assert list(bench_steps.first_blocks(model)) == ["double block", "single block"]
    assert [site for _, site in bench_steps.first_blocks(model).values()] == [0, 1]


@pytest.mark.slow
def test_a_quick_batch_prints_its_methods_beside_the_bound(capsys, tmp_path):
    assert main(["batch", *QUICK, "--model", "kontext", "--out", str(tmp_path / "rows.csv")]) == 0
    rows = rows_in(tmp_path / "rows.csv")
    assert list(rows) == ["one by one", "batch", "padded"]
    assert all(float(row["measured_over_bound"]) > 0 for row in rows.values())
    assert "of bound" in capsys.readouterr().out


def test_a_quick_run_without_out_writes_no_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What a cut run measures must never stand beside committed rows."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert main(["ops", *QUICK, "--kept", "0.25", "--rounds", "1", "--heads", "1"]) == 0
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_the_gate_is_red_for_a_method_that_changes_the_pipeline():
    case = tiny()
    pipe = random_pipelines.build(case, CPU, torch.float32)
    call = random_pipelines.caller(pipe, case)
    assert runs.gate(pipe, call, case, [METHODS["edges 25%"]])
    assert not runs.gate(pipe, call, case, [replace(METHODS["edges 25%"], config=SparseRef("grid", 1.0))])
    weight = pipe.transformer.proj_out.weight
    changing = iter([*[weight.clone()] * 4, weight * 1.01])

    def drifting(**size: int) -> Any:
        weight.copy_(next(changing, weight))
        return call(**size)

    assert not runs.gate(pipe, drifting, case, [METHODS["edges 25%"]])
