"""The report of hand-made runs, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.record import BlockAttention, RunRecord, Stability, StepRecord
from sparse_ref_attn.report import FlopSummary, attention_table, summary
from sparse_ref_attn.types import TokenLayout
from tests.hand_made_runs import dense_step, four_steps, layout_of, step_of


@pytest.fixture
def run() -> RunRecord:
    return four_steps()


def test_summary_numbers_are_those_worked_out_by_hand(run):
    got = summary(run, "dict", FlopSummary(100.0, 40.0, bound_seconds=5.7), dense_seconds=9.0)
    first, second = got["references"]
    # Kept of the first reference: 4, 4, 2, 1; of the second: 4, 4, 1, 0.
    assert (first["kept_min"], first["kept_mean"], first["kept_max"]) == (1, 2.75, 4)
    assert (second["kept_min"], second["kept_mean"], second["kept_max"]) == (0, 2.25, 4)
    assert (first["grid"], second["grid"]) == ([2, 2], None)
    assert first["mass_kept"] == pytest.approx((0.5 + 0.4) / 2)
    assert second["mass_kept"] == pytest.approx((0.25 + 0.0) / 2)
    assert got["steps"] == {
        "planned": 4, "ran": 4, "profile": 1, "in_flight": 0, "dense": 1, "sparse": 2, "cached": 0,
    }  # fmt: skip
    assert got["reference_tokens"] == {"all": 8, "mean_per_step": 5.0, "share": 0.625}
    assert got["seconds"]["total"] == 6.0
    assert got["seconds"]["per_sparse_step"] == 0.5
    assert got["seconds"]["per_cached_step"] is None
    assert got["speedup"] == {"sparse_step": 4.0, "run": 1.5, "dense_seconds": 9.0}
    assert got["host_ms_per_step"] == pytest.approx(2.0)
    assert got["flops"]["ratio"] == 2.5
    assert got["flops"]["bound_speedup"] == pytest.approx(9 / 5.7)
    assert got["flops"]["measured_over_bound"] == pytest.approx(0.95)
    assert got["by_step"]["kept"] == [8, 8, 3, 1]


def test_tokens_that_leave_by_depth_count_in_the_blocks_before():
    layout = layout_of((2, 2), (1, 4))
    steps = [step_of(0, layout, [0, 4, 5]), step_of(1, layout, [0, 4])]
    steps[0].kind, steps[0].from_block = "in_flight", 2
    record = RunRecord(layout, 1, 2, steps=steps, blocks=8)
    record.mass = [torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.1, 0.1, 0.4, 0.4])]
    got = summary(record, "dict")
    first, second = got["references"]
    # Step 0: 4 in two blocks of eight, then 1 and 2; step 1: 1 and 1.
    assert (first["kept_min"], first["kept_mean"], first["kept_max"]) == (1, 1.375, 1.75)
    assert (second["kept_min"], second["kept_mean"], second["kept_max"]) == (1, 1.75, 2.5)
    assert got["reference_tokens"]["mean_per_step"] == ((2 * 8 + 6 * 3) / 8 + 2) / 2
    assert (got["by_step"]["kept"], got["by_step"]["from_block"]) == ([3, 2], [2, 0])
    assert got["steps"]["in_flight"] == 1
    assert (first["mass_kept"], second["mass_kept"]) == (0.5, pytest.approx(0.15))
    assert "1 in flight, 1 sparse" in summary(record)


def test_what_was_not_measured_is_never_a_number():
    layout = layout_of((2, 2))
    record = RunRecord(layout, 1, 3, steps=[dense_step(0, layout), step_of(1, layout, [0], seconds=0.5)])
    got = summary(record, "dict")
    assert got["references"][0]["mass_kept"] is None
    assert got["seconds"]["total"] is None  # step 0 has no time, so the whole run has none
    assert got["seconds"]["per_sparse_step"] == 0.5
    assert got["speedup"] == {"sparse_step": None, "run": None, "dense_seconds": None}
    assert got["host_ms_per_step"] is None
    assert got["flops"] is None
    text = summary(record)
    for name in ("speed-up of a sparse step", "speed-up of the whole run", "FLOP ratio", "bound", "library host time"):
        line = next(line for line in text.splitlines() if line.startswith(f"  {name}"))
        assert line.split()[-1] == "-"
    assert "2 of 3 planned" in text


def test_a_profile_step_is_no_dense_step(run):
    run.steps = [step for step in run.steps if step.kind != "dense"]
    assert summary(run, "dict")["speedup"]["sparse_step"] is None


def test_cached_steps_without_a_selection_are_not_guessed():
    layout = layout_of((2, 2), (1, 4))
    record = RunRecord(layout, 1, 2, steps=[step_of(0, layout, [0, 4]), StepRecord(1, "cached", 2)])
    record.mass = [torch.ones(4), torch.ones(4)]
    row = summary(record, "dict")["references"][0]
    assert (row["kept_mean"], row["mass_kept"]) == (None, None)
    one = layout_of((2, 2))
    record = RunRecord(one, 1, 2, steps=[step_of(0, one, [0]), StepRecord(1, "cached", 3)])
    assert summary(record, "dict")["references"][0]["kept_mean"] == 2.0


def test_json_is_the_dict(run):
    flops = FlopSummary(2.0, 1.0)
    assert json.loads(summary(run, "json", flops, 3.0)) == summary(run, "dict", flops, 3.0)


def test_text_is_aligned_and_fits_a_terminal(run):
    run.notes = ["a long note " * 30]
    text = summary(run, flops=FlopSummary(12345.678, 4000.0, 5.7), dense_seconds=9.0)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    header, rule, first, second = lines[1:5]
    ends = [i for i in range(len(rule)) if rule[i] == "-" and rule[i + 1 : i + 2] != "-"]
    for line in (header, first, second):  # every column but the grid ends where its rule ends
        assert all(line[end] != " " for end in ends[:1] + ends[2:])
    assert "2.8 (68.8 %)" in first
    assert "profile 3.00 s, dense 2.00 s, sparse 500 ms" in text
    assert "1.50x over 9.00 s dense" in text
    assert "measured speed is 0.95 of the bound's" in text


def test_markdown_tables_have_whole_rows(run):
    lines = summary(run, "markdown").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert [line.count("|") for line in tables] == [8] * 4 + [3] * (len(tables) - 4)
    assert "| 1 | 2 x 2 | 4 | 1 (25 %) | 2.8 (68.8 %) | 4 (100 %) | 45 % |" in lines
    assert "- the guard kept | more" in lines


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda r: r.steps.clear(), LayoutError, "got 0 steps"),
        (lambda r: setattr(r, "layout", TokenLayout(8, 0, (0, 8), ())), LayoutError, "0 references"),
        (lambda r: setattr(r, "layout", layout_of((2, 3), 4)), LayoutError, r"references of \(6, 4\) tokens"),
        (lambda r: setattr(r, "mass", [torch.ones(4)]), LayoutError, "mass must have"),
    ],
)
def test_summary_of_a_broken_run_says_what_is_wrong(run, change, error, words):
    change(run)
    with pytest.raises(error, match=words):
        summary(run)


def test_settings_out_of_range_are_refused(run):
    with pytest.raises(ConfigError, match="yaml"):
        summary(run, "yaml")
    with pytest.raises(ConfigError, match="dense_seconds"):
        summary(run, dense_seconds=0.0)
    with pytest.raises(ConfigError, match="dense_seconds must be finite and above 0, got 'fast'"):
        summary(run, dense_seconds="fast")
    for bad in ((0.0, 1.0), (1.0, math.nan), (1.0, 1.0, -2.0)):
        with pytest.raises(ConfigError, match="above 0"):
            FlopSummary(*bad)


def test_attention_table_means_match_the_full_tensor():
    steps, blocks, references, heads = 2, 3, 2, 4
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, steps, blocks, references, heads, generator=generator, dtype=torch.float64)
    record = RunRecord(layout_of((2, 2), 8), 1, 2)
    record.attention = [
        BlockAttention(s, b, *(values[i, s, b].float() for i in range(3))) for s in range(steps) for b in range(blocks)
    ]
    table = attention_table(record)
    for i, name in enumerate(("mass", "entropy", "top_quarter")):
        v = values[i].float().double()
        assert table["by_step"][name] == pytest.approx(v.mean((1, 2, 3)).tolist())
        assert table["by_block"][name] == pytest.approx(v.mean((0, 2, 3)).tolist())
        assert table["by_reference"][name] == pytest.approx(v.mean((0, 1, 3)).tolist())
        assert table["by_head"][name] == pytest.approx(v.mean((0, 2)).flatten().tolist())
        assert table["each"][name] == pytest.approx(v.flatten().tolist())
    assert table["by_reference"]["reference"] == [1, 2]
    assert table["by_reference"]["entropy_uniform"] == [2.0, 3.0]
    assert table["by_head"]["head"] == [0, 1, 2, 3] * blocks
    assert len(table["text"].splitlines()) == (2 + steps) + 1 + (2 + references) + 1 + (2 + blocks)
    json.dumps(table, allow_nan=False)


def test_attention_that_is_not_finite_is_left_out_of_the_means():
    record = RunRecord(layout_of((2, 2)), 1, 1)
    entropy = torch.tensor([[1.0, math.nan]])
    record.attention = [BlockAttention(0, 0, torch.ones(1, 2), entropy, entropy)]
    table = attention_table(record)
    assert table["by_step"]["entropy"] == [1.0]
    assert table["each"]["entropy"] == [1.0, None]


def test_attention_table_needs_a_profiled_run(run):
    with pytest.raises(ConfigError, match="profiling step"):
        attention_table(run)


def test_a_ranking_of_one_token_has_no_rank_correlation(run):
    run.stability.append(Stability(2, (math.nan, 0.5), 0.75))
    assert json.loads(summary(run, "json"))["stability"][0]["spearman"] == [None, 0.5]
    assert "rank correlation 0.50 to 0.50" in summary(run)
    run.stability[0] = Stability(2, (math.nan, math.nan), 0.75)
    assert "rank correlation undefined, 75 % or more of the kept stayed" in " ".join(summary(run).split())
