"""The chosen presets fit any number of steps, run on every pipeline, and say what does where they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparse_ref_attn as sra
from sparse_ref_attn.estimation import Amount
from sparse_ref_attn.patching.execution import room
from sparse_ref_attn.presets import CHOSEN, PRESETS, configuration
from sparse_ref_attn.refresh import standard
from sparse_ref_attn.types import Reference
from sparse_ref_attn.vocabulary import CHOSEN_PRESETS, DEFAULT_PRESET
from tests.pipelines import CASES
from tests.test_batch import Items, record


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("faithful", {1: [0], 4: [0, 2], 8: [0, 4], 12: [0, 3, 6, 9], 28: [0, 7, 14, 21]}),
        ("balanced", {1: [0], 4: [0, 2], 8: [0, 4], 12: [0, 6], 28: [0, 14]}),
        ("fast", {1: [0], 4: [0], 8: [0], 12: [0], 28: [0]}),
    ],
)
def test_references_are_computed_at_shares_of_any_run(name: str, full: dict[int, list[int]]) -> None:
    config = configuration(name)
    assert config.budget.keep == 1.0
    assert config.guard is None
    for steps, at in full.items():
        assert sorted((config.refresh or standard(steps)).steps(steps)) == at


def test_the_names_are_those_of_the_vocabulary_and_balanced_is_meant_by_none() -> None:
    assert tuple(CHOSEN) == CHOSEN_PRESETS
    assert configuration(None) == configuration("Balanced") == PRESETS[DEFAULT_PRESET]()
    with sra.patched(CASES["kontext"].build()) as handle:
        assert handle.config == configuration("balanced")


@pytest.mark.parametrize("case", ["kontext", "klein", "qwen_edit_plus_2511"])
def test_they_run_and_leave_the_pipeline_as_it_was(case: str) -> None:
    pipe = CASES[case].build()
    dense = CASES[case].call(pipe, steps=4)
    for name, computed in (("faithful", 2), ("balanced", 2), ("fast", 1)):
        with sra.patched(pipe, name) as handle:
            assert CASES[case].call(pipe, steps=4).shape == dense.shape
        kinds = [step.kind for step in handle.record.steps]
        assert (kinds.count("dense"), kinds.count("cached")) == (computed, 4 - computed)
    assert np.array_equal(CASES[case].call(pipe, steps=4), dense)


def test_klein_kv_keeps_its_references_itself_and_is_left_alone() -> None:
    pipe, case = CASES["klein_kv"].build(), CASES["klein_kv"]
    own = case.call(pipe, steps=3)
    for name in CHOSEN:
        with sra.patched(pipe, name):
            assert np.array_equal(case.call(pipe, steps=3), own)


class _Hidden(nn.Module):
    """A transformer whose attention nobody named."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_model_whose_attention_is_not_known_is_told_what_runs() -> None:
    adapter = sra.PlainAdapter(tokens="x", find=lambda kwargs: ((0, 4), (Reference(4, 4, (2, 2)),)))
    model = _Hidden()
    words = r'be named to a PlainAdapter: attention=\["single"\] .* Else drop tokens: "sparse-context"'
    with pytest.raises(sra.IncompatibleError, match=words):
        sra.patch(model, adapter=adapter)
    with sra.patched(model, sra.SparseContext(0.5, "grid"), adapter=adapter) as handle:
        handle.begin(steps=1)
        handle.step(0)
        model(torch.zeros(1, 8, 2))
        assert handle.record.steps[0].kept == 2


def test_a_loop_that_tells_no_steps_is_told_which_presets_need_none() -> None:
    words = r'needs the run\'s number of steps, .* or take "faithful" or "fast"'
    source, calls = CASES["kontext"].build(), []
    hook = source.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    CASES["kontext"].call(source, steps=2)
    hook.remove()
    with sra.patched(source.transformer), pytest.raises(sra.ConfigError, match=words):
        source.transformer(**calls[0])
    for name in ("faithful", "fast"):
        with sra.patched(source.transformer, name) as handle:
            for call in calls:
                source.transformer(**call)
        assert [step.kind for step in handle.record.steps] == ["dense", "cached"]


def test_a_batch_takes_the_default_too() -> None:
    case = CASES["klein"]
    pipe = case.build()
    items = Items(case, pipe, steps=4)
    alone, steps = items.alone(configuration("balanced"))
    done = items.together(None)
    assert [record(handle) for handle in done.handles[:2]] == steps[:2]
    assert [kind for kind, _ in steps[0]] == ["dense", "cached", "dense", "cached"]
    for one, picture in zip(done.images, alone, strict=True):
        assert np.allclose(one, picture, atol=2e-5)


def test_a_run_that_cannot_fit_names_presets_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["klein"]
    pipe = case.build()
    monkeypatch.setattr(room, "free_bytes", lambda device: 0)
    words = r'keys and values of \d+ reference tokens .* or drop tokens \("sparse-context", "recast"'
    with sra.patched(pipe), pytest.raises(sra.BudgetError, match=words):
        case.call(pipe)
    with sra.patched(pipe, "sparse-context"):
        case.call(pipe)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "edit"}, r"task='edit' must come with a preset that drops tokens \(recast, sparse-context\)"),
        ({"select": "edges"}, "select='edges' must come with a preset that drops tokens"),
        ({"execute": "tokens"}, "execute='tokens' must come with a preset that drops tokens"),
        ({"execute": "cash"}, "did you mean 'cache'"),
        ({"per": "tile"}, "ranks for each tile by its own attention mass"),
        ({"profile": "in_flight"}, 'goes with execute="tokens"'),
    ],
)
def test_what_they_have_no_use_for_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(sra.ConfigError, match=words):
        Amount("balanced", None, settings)


def test_settings_and_shares_say_which_preset_is_meant() -> None:
    assert Amount(None, None, {"refresh": sra.Every(2)}).preset == "balanced"
    assert Amount(None, None, {"execute": "cache", "refresh": sra.Every(2)}).family(None).refresh == sra.Every(2)
    assert Amount("fast", None, {"execute": "cache"}).family(None) == configuration("fast")
    for keep, settings in ((0.25, {}), (None, {"task": "edit"}), (None, {"execute": "tokens"})):
        assert Amount(None, keep, settings).preset == "recast"
    with pytest.raises(sra.ConfigError, match=r"keep must come with .*, got 0\.25 with fast"):
        Amount("fast", 0.25, {})
