"""Stored references read per tile: each tile's own tokens and the means of the rest, against plain PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from benchmarks.studies.stored import Reading, stored
from sparse_ref_attn.models import adapter_for
from tests.adapters.test_dropping import ROUNDING, error
from tests.adapters.test_stored_references import JOINT, dense, run, with_keys_of
from tests.adapters.tiles_by_hand import ByTile, TilesOf
from tests.adapters.witnesses import GENERATION, Call, witnessed
from tests.latents import CASES, in_turn

joint = pytest.mark.parametrize("name", JOINT)
SIDES = (8, 8)  # the generation of every case


def joint_in_turn(place: int) -> pytest.MarkDecorator:
    """Over every transformer, and a third of the pipelines that have one of another pipeline."""
    return pytest.mark.parametrize("name", [name for name in in_turn(place, 3) if name in JOINT])


def tiled(budget: Any = 0.25, **settings: Any) -> sra.SparseRef:
    settings = {"refresh": sra.Every(2), "tile": 3, "cell": 3} | settings
    return sra.SparseRef(sra.AttentionMass("all"), budget, execute=sra.Cache(per="tile", **settings))


def by_hand(record: Any, text: int, step: int, **settings: Any) -> ByTile:
    grids = [reference.grid for reference in record.layout.references]
    counts = record.steps[step].selection.counts()
    return ByTile(text, SIDES, grids, **({"counts": counts, "tile": 3, "cell": 3} | settings))


def wanted(fresh: Any, call: Call, earlier: Call, by: ByTile) -> torch.Tensor:
    with TilesOf(by, earlier.attention):
        out = fresh(**call.given)
    return (out[0] if isinstance(out, tuple) else out.sample)[:, :GENERATION]


@joint
@torch.no_grad()
def test_a_cached_step_reads_what_each_tile_chose_and_the_means_of_the_rest(name: str) -> None:
    """Of two references, where a pipeline takes more than one."""
    case = CASES[name]
    calls, record = run(name, tiled(), references=min(2, max(case.references)), steps=4)
    assert [step.kind for step in record.steps] == ["profile", "cached", "dense", "cached"]
    fresh = case.model()
    for i, call in enumerate(calls):
        if i % 2 == 0:
            assert torch.equal(call.sample[:, :GENERATION], dense(fresh, call)[:, :GENERATION])
            continue
        assert call.reached["hidden_states"].shape[1] == GENERATION
        got, by = call.sample[:, :GENERATION], by_hand(record, call.text, i)
        assert error(got, wanted(fresh, call, calls[i - 1], by)) < ROUNDING
        assert not call.sample[:, GENERATION:].any()
    call, got = calls[1], calls[1].sample[:, :GENERATION]
    for other in (by_hand(record, call.text, 1, tile=4), by_hand(record, call.text, 1, cell=None)):
        assert error(got, wanted(fresh, call, calls[0], other)) > 10 * ROUNDING


@joint_in_turn(0)
@torch.no_grad()
def test_means_may_be_by_the_attention_that_the_tokens_got(name: str) -> None:
    calls, record = run(name, tiled(rest="weighted"), steps=2)
    fresh, call = CASES[name].model(), calls[1]
    by = by_hand(record, call.text, 1, weighted=True)
    got = call.sample[:, :GENERATION]
    assert error(got, wanted(fresh, call, calls[0], by)) < ROUNDING
    assert error(got, wanted(fresh, call, calls[0], by_hand(record, call.text, 1))) > 3 * ROUNDING


@joint_in_turn(1)
def test_refreshed_at_every_step_is_the_unpatched_pipeline_bit_for_bit(name: str) -> None:
    case, pipe, request = CASES[name], CASES[name].build(), {"steps": 2, "cfg": CASES[name].cfg}
    with sra.patched(pipe, tiled(refresh=sra.Every(1))) as handle:
        assert np.array_equal(case.call(pipe, **request), case.dense(**request))
        assert "cached" not in {step.kind for step in handle.record.steps}
    assert np.array_equal(case.call(pipe, **request), case.dense(**request))


@joint_in_turn(2)
@torch.no_grad()
def test_a_budget_of_everything_reads_everything_and_measures_for_nothing(name: str) -> None:
    calls, record = run(name, tiled(1.0), steps=3)
    assert [step.kind for step in record.steps] == ["profile", "cached", "dense"]
    whole = with_keys_of(CASES[name].model(), calls[1].given, calls[0])[:, :GENERATION]
    assert error(calls[1].sample[:, :GENERATION], whole) < ROUNDING
    assert record.tiles is None
    once = run(name, tiled(1.0, refresh=sra.Never()), steps=1)[1]
    assert record.scoring_flops == once.scoring_flops > 0  # the run's own ranking alone


@torch.no_grad()
def test_the_runs_own_scores_are_pooled_over_the_tiles() -> None:
    """Of the blocks and steps that the selector names; and each full step measures every layer once."""
    for select in (sra.AttentionMass("all"), sra.AttentionMass((1, 2)), sra.AttentionMass("single", steps=(0, 1))):
        way = sra.Cache(per="tile", refresh=sra.Never(), tile=3)
        record = run("kontext", sra.SparseRef(select, 0.25, execute=way), steps=3)[1]
        plain = run("kontext", sra.SparseRef(select, 0.25, execute=sra.Cache(refresh=sra.Never())), steps=3)[1]
        torch.testing.assert_close(record.scores, plain.scores, rtol=1e-5, atol=1e-7)
        assert record.steps[2].selection.counts() == plain.steps[2].selection.counts()
        full = sum(step.kind != "cached" for step in record.steps)
        layers = 4 * full / len({(part.step, part.block) for part in plain.attention})
        assert record.scoring_flops == layers * plain.scoring_flops


@pytest.mark.parametrize(("weights", "counts"), [(None, (48,)), ((4.0, 1.0), (48,))])
@torch.no_grad()
def test_references_may_compete(weights: Any, counts: tuple[int, ...]) -> None:
    """One number for all, within each tile."""
    setting = sra.SparseRef(
        sra.AttentionMass("all"), sra.Constant(48, per="all"), weights=weights,
        execute=sra.Cache(per="tile", refresh=sra.Never(), tile=3, cell=3),
    )  # fmt: skip
    calls, record = run("klein", setting, references=2, steps=2)
    by = by_hand(record, calls[1].text, 1, counts=counts, weights=weights)
    fresh, got = CASES["klein"].model(), calls[1].sample[:, :GENERATION]
    assert error(got, wanted(fresh, calls[1], calls[0], by)) < ROUNDING
    other = by_hand(record, calls[1].text, 1, counts=counts, weights=(1.0, 4.0))
    assert error(got, wanted(fresh, calls[1], calls[0], other)) > 10 * ROUNDING


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
@torch.no_grad()
def test_each_branch_of_guidance_ranks_by_its_own_mass(name: str) -> None:
    calls, record = run(name, tiled(refresh=sra.Never()), steps=2, cfg=True, references=max(CASES[name].references))
    assert [step.calls for step in record.steps] == [2, 2]
    fresh = CASES[name].model()
    for i in (2, 3):
        by, got = by_hand(record, calls[i].text, 1), calls[i].sample[:, :GENERATION]
        assert error(got, wanted(fresh, calls[i], calls[i - 2], by)) < ROUNDING
        if calls[0].text == calls[1].text:
            assert error(got, wanted(fresh, calls[i], calls[3 - i], by)) > 10 * ROUNDING


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit"])
@torch.no_grad()
def test_each_item_of_a_batch_ranks_by_its_own_mass(name: str) -> None:
    """Two prompts of different lengths, padded where the model masks them, and two images of each."""
    calls, record = run(name, tiled(refresh=sra.Never()), steps=2, batch=2, images_per_prompt=2)
    assert calls[1].given["hidden_states"].shape[0] == 4
    fresh, by = CASES[name].model(), by_hand(record, calls[1].text, 1)
    assert error(calls[1].sample[:, :GENERATION], wanted(fresh, calls[1], calls[0], by)) < ROUNDING


@torch.no_grad()
def test_a_budget_that_changes_at_every_step_is_a_prefix() -> None:
    calls, record = run("klein", tiled(sra.Linear(0.1, 0.6), refresh=sra.At((2,))), references=2, steps=5)
    fresh, counts = CASES["klein"].model(), []
    for i, earlier in ((1, 0), (3, 2), (4, 2)):
        by = by_hand(record, calls[i].text, i)
        counts.append(by.counts)
        assert error(calls[i].sample[:, :GENERATION], wanted(fresh, calls[i], calls[earlier], by)) < ROUNDING
    assert len(set(counts)) == 3


@torch.no_grad()
def test_a_step_may_read_everything_between_others() -> None:
    """Tiles rank for the steps that read a part, though another reads more than any ranking holds."""
    budget = sra.Pieces((0.2, 0.5, 1.0, 0.3), (0.2, 0.5, 0.8))
    calls, record = run("klein", tiled(budget, refresh=sra.Never()), steps=4)
    assert [step.kept for step in record.steps] == [96, 48, 96, 29]
    fresh = CASES["klein"].model()
    for i in (1, 3):
        by = by_hand(record, calls[i].text, i)
        assert error(calls[i].sample[:, :GENERATION], wanted(fresh, calls[i], calls[0], by)) < ROUNDING


@torch.no_grad()
def test_a_budget_that_the_mass_decides() -> None:
    """Nobody knows before the first full step how many tokens tiles will read."""
    calls, record = run("klein", tiled(sra.TopP(0.5), refresh=sra.At((2,))), references=2, steps=4)
    assert 0 < record.steps[1].kept < sum(record.layout.sizes)
    fresh = CASES["klein"].model()
    for i in (1, 3):
        by = by_hand(record, calls[i].text, i)
        assert error(calls[i].sample[:, :GENERATION], wanted(fresh, calls[i], calls[i - 1], by)) < ROUNDING


@pytest.mark.parametrize("budget", [0.25, sra.Linear(0.2, 0.5)], ids=str)
@torch.no_grad()
def test_a_loop_that_does_not_tell_its_steps(budget: Any) -> None:
    pipe = CASES["kontext"].build()
    with witnessed(pipe.transformer) as given:
        CASES["kontext"].call(pipe, steps=4)
    model = CASES["kontext"].build().transformer
    with sra.patched(model, tiled(budget)) as handle, witnessed(model) as calls:
        for call in given:
            model(**call.given)
        record = handle.record
    assert [step.kind for step in record.steps] == ["profile", "cached", "dense", "cached"]
    fresh = CASES["kontext"].model()
    for i in (1, 3):
        by = by_hand(record, calls[i].text, i)
        assert error(calls[i].sample[:, :GENERATION], wanted(fresh, calls[i], calls[i - 1], by)) < ROUNDING


@torch.no_grad()
def test_drift_is_measured_on_the_rows_as_they_lie() -> None:
    refresh = sra.Drift(1e-6, at_most_every=3)
    calls, record = run("kontext", tiled(refresh=refresh), steps=8)
    full = [step.index for step in record.steps if step.kind != "cached"]
    assert full == [0, 1, 4, 7]
    moved = []
    for old, new in zip(calls[1].attention, calls[4].attention, strict=True):
        rows = [(x[:, -96:].double(), y[:, -96:].double()) for x, y in ((old.k, new.k), (old.v, new.v))]
        moved.append(max(float((y - x).norm() / y.norm()) for x, y in rows))
    torch.testing.assert_close(record.steps[4].drift.double(), torch.tensor(moved).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("cell", "rest"), [(4, "means"), (0, None)])
def test_as_the_study_that_proposed_it(cell: int, rest: str | None) -> None:
    """``benchmarks/studies/stored.py``, whose masks and biases stand in for a gather: whole pictures."""
    case, pipe = CASES["kontext"], CASES["kontext"].build()
    way = sra.Cache(per="tile", tile=2, rest=rest, refresh=sra.At((3,)))
    with sra.patched(pipe, sra.SparseRef("mass", 0.125, execute=way)):
        got = case.call(pipe, steps=6)
    transformer = pipe.transformer
    with stored(transformer, adapter_for(transformer), Reading((0, 3), "tile", 0.125, tile=2, cell=cell)):
        study = case.call(pipe, steps=6)
    dense = case.call(pipe, steps=6)
    assert np.abs(got - study).max() < 1e-4 < 0.01 * np.abs(study - dense).max()
