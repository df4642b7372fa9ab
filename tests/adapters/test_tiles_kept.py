"""Klein-KV's own cache read per tile: each tile's own tokens and the means of the rest, against plain PyTorch."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.errors import ConfigError, IncompatibleError, LayoutError
from tests.adapters.test_dropping import ROUNDING, error
from tests.adapters.test_stored_references import run
from tests.adapters.test_tiles import by_hand, tiled
from tests.adapters.tiles_by_hand import ByTile, TilesOf
from tests.adapters.witnesses import GENERATION, Attention, Call, witnessed
from tests.latents import CASES

CASE = CASES["klein_kv"]
LAYERS = 4


def references_last(call: Call, tokens: int) -> list[Attention]:
    """A call's attention of text and generation to every row, its keys as text | generation | references."""
    text, own = call.text, call.text + GENERATION
    order = torch.cat([torch.arange(text), text + tokens + torch.arange(GENERATION), text + torch.arange(tokens)])
    found = [each for each in call.attention if (each.q.shape[1], each.k.shape[1]) == (own, own + tokens)]
    assert len(found) == LAYERS
    return [replace(each, k=each.k[:, order], v=each.v[:, order]) for each in found]


def wanted(fresh: Any, call: Call, earlier: Call, by: ByTile) -> torch.Tensor:
    """The model without a cache on text and generation alone, whose attention `by` answers."""
    given = call.given | {"kv_cache": None, "kv_cache_mode": None}
    with TilesOf(by, references_last(earlier, sum(by.sizes))):
        return fresh(**given)[0]


@pytest.mark.parametrize("references", [1, 3])
@torch.no_grad()
def test_a_cached_step_reads_what_each_tile_chose_and_the_means_of_the_rest(references: int) -> None:
    calls, record = run("klein_kv", tiled(), references=references, steps=3, batch=2)
    assert [step.kind for step in record.steps] == ["profile", "cached", "cached"]
    fresh = CASE.model()
    assert torch.equal(calls[0].sample, fresh(**calls[0].given)[0])
    for i, call in list(enumerate(calls))[1:]:
        assert call.reached["kv_cache"] is None
        by = by_hand(record, call.text, i)
        assert error(call.sample, wanted(fresh, call, calls[0], by)) < ROUNDING
        for other in (by_hand(record, call.text, i, tile=4), by_hand(record, call.text, i, cell=None)):
            assert error(call.sample, wanted(fresh, call, calls[0], other)) > 10 * ROUNDING


@torch.no_grad()
def test_means_may_be_by_the_attention_that_the_tokens_got() -> None:
    calls, record = run("klein_kv", tiled(rest="weighted"), references=2, steps=2, batch=2)
    fresh, call = CASE.model(), calls[1]
    by = by_hand(record, call.text, 1, weighted=True)
    assert error(call.sample, wanted(fresh, call, calls[0], by)) < ROUNDING
    assert error(call.sample, wanted(fresh, call, calls[0], by_hand(record, call.text, 1))) > 3 * ROUNDING


@torch.no_grad()
def test_a_budget_that_changes_is_a_prefix_and_one_of_everything_the_models_own_step() -> None:
    budget = sra.Pieces((0.2, 0.5, 1.0, 0.3), (0.2, 0.5, 0.8))
    calls, record = run("klein_kv", tiled(budget), references=2, steps=4)
    assert [step.kept for step in record.steps] == [160, 80, 160, 48]
    fresh = CASE.model()
    _, cache = fresh(**calls[0].given)
    assert torch.equal(calls[2].sample, fresh(**calls[2].given | {"kv_cache": cache})[0])
    for i in (1, 3):
        by = by_hand(record, calls[i].text, i)
        assert error(calls[i].sample, wanted(fresh, calls[i], calls[0], by)) < ROUNDING


def test_a_budget_of_everything_is_the_unpatched_pipeline_bit_for_bit_and_measures_for_nothing() -> None:
    pipe = CASE.build()
    dense = CASE.call(pipe, references=3, batch=2)
    with sra.patched(pipe, tiled(1.0)) as handle:
        assert np.array_equal(CASE.call(pipe, references=3, batch=2), dense)
        assert handle.record.tiles is None
        assert handle.record.steps[-1].cache_bytes == handle.record.dense_cache_bytes
    with sra.patched(pipe, sra.SparseRef(sra.AttentionMass("all"), 1.0, "cache")) as plain:
        CASE.call(pipe, references=3, batch=2)
    assert handle.record.scoring_flops == plain.record.scoring_flops > 0
    with sra.patched(pipe, tiled()):
        assert not np.array_equal(CASE.call(pipe, references=3, batch=2), dense)
    assert np.array_equal(CASE.call(pipe, references=3, batch=2), dense)


@torch.no_grad()
def test_a_step_that_profiles_later_reads_everything_and_ranks_tiles_anew() -> None:
    select = sra.AttentionMass("all", steps=(1,))
    setting = sra.SparseRef(select, 0.25, execute=sra.Cache(per="tile", tile=3, cell=3))
    calls, record = run("klein_kv", setting, references=2, steps=4)
    assert [(step.kind, step.kept) for step in record.steps] == [
        ("dense", 160),
        *[("cached", n) for n in (160, 40, 40)],
    ]
    fresh = CASE.model()
    _, cache = fresh(**calls[0].given)
    assert torch.equal(calls[1].sample, fresh(**calls[1].given | {"kv_cache": cache})[0])
    for i in (2, 3):
        by = by_hand(record, calls[i].text, i)
        assert error(calls[i].sample, wanted(fresh, calls[i], calls[1], by)) < ROUNDING
        assert error(calls[i].sample, wanted(fresh, calls[i], calls[0], by)) > 10 * ROUNDING


@torch.no_grad()
def test_the_runs_own_scores_and_its_work() -> None:
    record = run("klein_kv", tiled(), references=2)[1]
    plain = run("klein_kv", sra.SparseRef(sra.AttentionMass("all"), 0.25, "cache"), references=2)[1]
    torch.testing.assert_close(record.scores, plain.scores, rtol=1e-5, atol=1e-7)
    assert record.scoring_flops == plain.scoring_flops


def test_the_rows_are_the_models_own_and_go_with_its_cache() -> None:
    pipe, alike = CASE.build(), []

    with sra.patched(pipe, tiled()) as handle:
        keeper = handle._generations.cache

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("kv_cache_mode") == "cached":
                (held,), own = keeper._held.values(), keeper.hooks.layers(kwargs["kv_cache"])
                alike.append(
                    [held.cache.rows(i)[0].data_ptr() for i in range(LAYERS)] == [x.get()[0].data_ptr() for x in own]
                )
                assert held.nbytes > held.bytes_of_all == 2 * LAYERS * 160 * 2 * 16 * 4

        pipe.transformer.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        CASE.call(pipe, references=2)
        assert alike == [True, True]
        gc.collect()
        assert not keeper._held
        steps = handle.record.steps
        assert (
            steps[2].cache_bytes
            == steps[1].cache_bytes
            > steps[0].cache_bytes
            > handle.record.dense_cache_bytes
            == 2 * LAYERS * 160 * 128
        )
    assert "each of 3 x 3 tiles of 3 x 3" in handle.summary()


@torch.no_grad()
def test_the_cache_of_an_earlier_run_is_measured_in_the_first_step() -> None:
    pipe = CASE.build()
    with sra.patched(pipe, tiled()) as handle:
        handle.capture()
        CASE.call(pipe, references=2, batch=2)
        whole = handle.reference_cache
    assert whole.complete
    with sra.patched(pipe, tiled()) as handle, witnessed(pipe.transformer) as calls:
        handle.reuse(whole)
        CASE.call(pipe, references=2, batch=2, seed=5)
        record = handle.record
    assert [(step.kind, step.kept) for step in record.steps] == [("cached", n) for n in (160, 40, 40)]
    fresh = CASE.model()
    for i in (1, 2):
        by = by_hand(record, calls[i].text, i)
        assert error(calls[i].sample, wanted(fresh, calls[i], calls[0], by)) < ROUNDING
    with sra.patched(pipe, sra.SparseRef("grid", 0.3, execute="both")) as handle:
        handle.capture()
        CASE.call(pipe, references=2, batch=2)
        part = handle.reference_cache
    with sra.patched(pipe, tiled()) as handle:
        handle.reuse(part)
        words = r'per="tile" ranks by the attention to every token: .* all of the 160, got 48'
        with pytest.raises(ConfigError, match=words):
            CASE.call(pipe, references=2, batch=2)


def test_a_cache_that_another_run_filled_is_refused() -> None:
    pipe, kept = CASE.build(), []
    taken = pipe.transformer.register_forward_hook(
        lambda m, a, k, out: kept.append(out[1]) if k.get("kv_cache_mode") == "extract" else None, with_kwargs=True
    )
    CASE.call(pipe, references=2)
    taken.remove()

    def swap(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, kwargs | {"kv_cache": kept[0]}) if kwargs.get("kv_cache_mode") == "cached" else None

    with sra.patched(pipe, tiled()):
        pipe.transformer.register_forward_pre_hook(swap, with_kwargs=True, prepend=True)
        with pytest.raises(LayoutError, match="that this run's first step stored, got others"):
            CASE.call(pipe, references=2)


def test_a_generation_without_a_grid_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, ran = CASE.build(), []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *args: ran.append(args))
    monkeypatch.setattr("sparse_ref_attn.models.flux2.adapter.grid_of_ids", lambda *args: None)
    with (
        sra.patched(pipe, tiled()),
        pytest.raises(IncompatibleError, match='per="tile" needs the height and width in tokens of the 64 generation'),
    ):
        CASE.call(pipe)
    assert not ran


@pytest.mark.parametrize("rest", ["means", None])
@pytest.mark.parametrize("steps", [(0,), (0, 1)])
def test_an_estimate_is_what_the_run_then_does(rest: str | None, steps: tuple[int, ...]) -> None:
    pipe = CASE.build()
    way = sra.Cache(per="tile", tile=3, rest=rest)
    setting = sra.SparseRef(sra.AttentionMass("all", steps=steps), sra.Linear(0.2, 0.6), execute=way)
    with sra.patched(pipe, setting) as handle:
        CASE.call(pipe, steps=4)
        record, flops = handle.record, handle.flops()
    (height, width), cell = record.layout.references[0].grid, 8
    e = sra.estimate(
        pipe.transformer, references=[(cell * width, cell * height)], output=(64, 64), text_tokens=record.layout.text,
        steps=4, config=setting, pixels_per_token=cell,
    )  # fmt: skip
    assert e.tokens == tuple(step.kept for step in record.steps)
    assert e.scoring.total == pytest.approx(record.scoring_flops)
    assert e.sparse.total / 1e12 == pytest.approx(flops.sparse_tflop)
    own = pipe.transformer.dtype.itemsize
    held = max(step.cache_bytes for step in record.steps)
    assert e.memory.sparse_step.reference_kv >= held * own // 4
