"""A plan is the chooser's answer for one call's sizes, with what fewer steps would give beside it."""

from __future__ import annotations

import json
from typing import Any

import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.candidates import CANDIDATES
from sparse_ref_attn.models import named_model
from sparse_ref_attn.planning import known, least_loss


@pytest.fixture(scope="module")
def kontext() -> Any:
    return named_model("kontext", num_layers=2, num_single_layers=4)


@pytest.fixture(scope="module")
def klein() -> Any:
    return named_model("klein-9b", num_layers=2, num_single_layers=6)


def test_the_plan_is_the_candidate_that_loses_least_of_those_that_are_fast_enough(kontext: Any) -> None:
    found = sra.plan(kontext, 1.7, steps=28)
    ratio = sra.estimate(kontext, found.config, steps=28).flop_ratio
    assert found.config == CANDIDATES[found.best.key]
    assert found.best.estimate.flop_ratio == ratio >= 1.7
    speeds = {key: sra.estimate(kontext, CANDIDATES[key], steps=28).flop_ratio for key in known(28)}
    assert found.best.key == least_loss(1.7, speeds, known(28))
    assert sra.plan(kontext, 1.0, steps=28).best.loss.dense_db > found.best.loss.dense_db
    low, high = found.best.bound
    assert low <= ratio * (1 + 1e-9)
    assert ratio <= high * (1 + 1e-9)


def test_more_references_make_more_speed_to_be_had(klein: Any) -> None:
    one, four = (sra.plan(klein, 2.5, references=[(1024, 1024)] * n, steps=28) for n in (1, 4))
    assert one.best is None
    assert one.together is not None
    assert four.best is not None
    assert four.together is None


def test_fewer_steps_stand_beside_it(kontext: Any) -> None:
    fewer = sra.plan(kontext, 1.7, steps=28).fewer_steps
    assert (fewer.steps, fewer.flop_ratio, fewer.key) == (16, 28 / 16, None)
    assert (fewer.loss.steps, fewer.loss.base_steps) == (6, 12)  # the nearest share that was measured
    assert sra.plan(kontext, 4.0, steps=3).fewer_steps is None
    assert sra.plan(kontext, 1.0, steps=28).fewer_steps is None


def test_a_speed_that_cannot_be_had_is_said_with_what_can(kontext: Any) -> None:
    found = sra.plan(kontext, 3, steps=28)
    words = r"got 3x where the fastest candidate, stored-once, saves 1\.8\dx; 9 of 28 steps with every token save that"
    with pytest.raises(sra.ConfigError, match=words):
        _ = found.config
    together = found.together
    config = CANDIDATES[together.key]
    dense = sra.estimate(kontext, config, steps=28).dense.total
    for steps, enough in ((together.steps, True), (together.steps + 1, False)):
        assert (dense / sra.estimate(kontext, config, steps=steps).sparse.total >= 3) == enough
    assert f"{together.steps} of 28 steps, {together.key}: {together.flop_ratio:.2f}x" in found.summary()
    assert json.loads(json.dumps(found.to_dict()))["best"] is None


def test_what_it_says_can_be_copied_and_read_by_programs(kontext: Any) -> None:
    found = sra.plan(kontext, 1.5, steps=12)
    data = json.loads(json.dumps(found.to_dict()))
    assert eval(data["best"]["code"], {"sra": sra}) == found.config
    assert f"sra.patch(pipe, {data['best']['code']})" in found.summary()
    assert data["best"]["peak_bytes"] == found.best.estimate.memory.sparse.total
    assert data["best"]["loss"]["db"] == known(12)[found.best.key].db
    assert data["fewer_steps"]["steps"] == 8
    assert found.best.loss.words in found._repr_html_()


def test_a_published_model_by_its_name_has_its_own_steps() -> None:
    found = sra.plan("klein-4b", 1.2)
    assert found.steps == 4
    assert found.best is not None
    with pytest.raises(sra.ConfigError, match="one reference image, got 2"):
        sra.plan("kontext", 1.2, references=[(1024, 1024)] * 2)
    with pytest.raises(sra.ConfigError, match="did you mean 'kontext'"):
        sra.plan("kontex", 1.2)


def test_a_model_that_keeps_its_references_itself_is_planned_as_it_is() -> None:
    model = named_model("klein-9b-kv", num_layers=2, num_single_layers=6)
    found = sra.plan(model, 1.2, steps=4)
    assert found.best.estimate.flop_ratio == sra.estimate(model, "fast", steps=4).flop_ratio


@pytest.mark.parametrize("speedup", [0.5, float("nan"), float("inf"), "2", True])
def test_a_speed_must_be_a_number_of_at_least_one(speedup: Any) -> None:
    with pytest.raises(sra.ConfigError, match="speedup must be dense work over the run's own, at least 1, got"):
        sra.plan("kontext", speedup)


class _Own:
    """An attention processor that dispatches to no backend."""

    def __call__(self, attn: Any, hidden_states: Any, **kwargs: Any) -> Any:
        return hidden_states


def test_a_model_that_hides_its_attention_is_told_why_nothing_can_be_planned() -> None:
    model = named_model("kontext", num_layers=2, num_single_layers=4)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.attn.processor = _Own()
    found = sra.plan(model, 1.5, steps=28)
    assert found.best is found.fastest is None
    assert any("attention must be known" in note and "sparse-context" in note for note in found.notes)
    with pytest.raises(sra.ConfigError, match=r"no candidate can run here; 18 of 28 steps with every token save that"):
        _ = found.config
