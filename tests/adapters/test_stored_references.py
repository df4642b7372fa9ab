"""Stored references: full steps are the dense model's, and cached ones attend to what the last full one had."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.errors import ConfigError
from tests.adapters.test_dropping import ROUNDING, error, noise, scores
from tests.adapters.witnesses import GENERATION, Call, KeysOf, best, witnessed
from tests.latents import CASES

JOINT = [name for name in CASES if name != "klein_kv"]
joint = pytest.mark.parametrize("name", JOINT)
ALL = sra.SparseRef("grid", 1.0, "cache")


def cached(budget: Any = 1.0, select: Any = None, **settings: Any) -> sra.SparseRef:
    select = sra.FromFunction(noise) if select is None else select
    return sra.SparseRef(select, budget, execute=sra.Cache(**settings))


def run(name: str, setting: sra.SparseRef, **request: Any) -> tuple[list[Call], Any]:
    """Calls and record of one run."""
    pipe = CASES[name].build()
    with sra.patched(pipe, setting) as handle, witnessed(pipe.transformer) as calls:
        CASES[name].call(pipe, **request)
    return calls, handle.record


def with_keys_of(fresh: Any, given: dict[str, Any], earlier: Call, kept: Tensor | None = None) -> Tensor:
    """What the dense model makes of a call whose reference keys and values are, in every layer, those that `earlier`
    had; of references that are not `kept`, (R,) bool, it sees none."""
    with KeysOf(earlier.attention, given["hidden_states"].shape[1] - GENERATION, kept):
        out = fresh(**given)
    return out[0] if isinstance(out, tuple) else out.sample


@joint
@torch.no_grad()
def test_a_cached_step_attends_to_what_the_last_full_one_stored(name: str) -> None:
    """Of two references, where a pipeline takes more than one."""
    case = CASES[name]
    calls, record = run(name, cached(refresh=sra.Every(2)), references=min(2, max(case.references)), steps=4)
    assert [step.kind for step in record.steps] == ["dense", "cached"] * 2
    fresh = case.model()
    for i, call in enumerate(calls):
        if i % 2 == 0:
            assert torch.equal(call.sample[:, :GENERATION], dense(fresh, call)[:, :GENERATION])
            continue
        assert call.reached["hidden_states"].shape[1] == GENERATION
        wanted = with_keys_of(fresh, call.given, calls[i - 1])
        assert error(call.sample[:, :GENERATION], wanted[:, :GENERATION]) < ROUNDING
        assert error(call.sample[:, :GENERATION], dense(fresh, call)[:, :GENERATION]) > 100 * ROUNDING
        assert not call.sample[:, GENERATION:].any()


def dense(fresh: Any, call: Call) -> Tensor:
    out = fresh(**call.given)
    return out[0] if isinstance(out, tuple) else out.sample


@joint
@torch.no_grad()
def test_a_budget_is_read_in_rank_order(name: str) -> None:
    share = 0.3
    calls, record = run(name, cached(share, refresh=sra.Never()), steps=2)
    sizes = record.layout.sizes
    kept = best(scores(sizes), sizes, share)
    assert [step.kept for step in record.steps] == [sum(sizes), int(kept.sum())]
    fresh = CASES[name].model()
    for call in calls[1:]:
        wanted = with_keys_of(fresh, call.given, calls[0], kept)
        assert error(call.sample[:, :GENERATION], wanted[:, :GENERATION]) < ROUNDING


@joint
def test_refreshed_at_every_step_is_the_unpatched_pipeline_bit_for_bit(name: str) -> None:
    case, pipe, request = CASES[name], CASES[name].build(), {"steps": 2, "cfg": CASES[name].cfg}
    with sra.patched(pipe, cached(refresh=sra.Every(1))) as handle:
        assert np.array_equal(case.call(pipe, **request), case.dense(**request))
        assert {step.kind for step in handle.record.steps} == {"dense"}
    assert np.array_equal(case.call(pipe, **request), case.dense(**request))


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
@torch.no_grad()
def test_each_branch_of_guidance_has_a_store_of_its_own(name: str) -> None:
    calls, record = run(name, cached(refresh=sra.Never()), steps=3, cfg=True)
    assert [step.calls for step in record.steps] == [2, 2, 2]
    fresh = CASES[name].model()
    for i, call in enumerate(calls[2:], start=2):
        right, wrong = (with_keys_of(fresh, call.given, calls[j])[:, :GENERATION] for j in (i % 2, 1 - i % 2))
        assert error(call.sample[:, :GENERATION], right) < ROUNDING
        assert error(call.sample[:, :GENERATION], wrong) > 10 * ROUNDING


@torch.no_grad()
def test_a_branch_that_begins_late_computes() -> None:
    """Guidance that sets in at step 1: its first call has nothing to read, and reads nobody else's."""
    pipe = CASES["kontext"].build()
    with witnessed(pipe.transformer) as calls:
        CASES["kontext"].call(pipe, steps=3, cfg=True)
    first, other = calls[0].given, calls[1].given
    fresh = CASES["kontext"].build().transformer
    handle = sra.patch(fresh, cached(refresh=sra.Never()))
    handle.begin(steps=3)
    fresh(**first)
    handle.step(1)
    fresh(**first)
    late = fresh(**other)[0]
    assert handle.record.steps[-1].kind == "dense"
    handle.step(2)
    again = fresh(**other)[0]
    handle.remove()
    assert torch.equal(late[:, :GENERATION], fresh(**other)[0][:, :GENERATION])
    assert error(again[:, :GENERATION], late[:, :GENERATION]) < ROUNDING


@torch.no_grad()
def test_texts_that_are_made_anew_are_known_by_their_values() -> None:
    pipe = CASES["kontext"].build()
    with witnessed(pipe.transformer) as calls:
        CASES["kontext"].call(pipe, steps=2)
    given, fresh = calls[0].given, CASES["kontext"].build().transformer
    handle = sra.patch(fresh, cached(refresh=sra.Never()))
    handle.begin(steps=3)
    for step in range(3):
        handle.step(step)
        fresh(**given | {"encoder_hidden_states": given["encoder_hidden_states"].clone()})
    assert [step.kind for step in handle.record.steps] == ["dense", "cached", "cached"]


@pytest.mark.parametrize(
    ("refresh", "full"),
    [(None, [0, 3, 5, 8]), (sra.Every(4, warmup=2), [0, 1, 4, 8]), (sra.Every(0.5, last=1), [0, 5, 9]),
     (sra.At((3, 0.9)), [0, 3, 9]), (sra.Never(), [0])],
)  # fmt: skip
def test_full_steps_are_those_that_are_asked_for(refresh: Any, full: list[int]) -> None:
    _, record = run("kontext", cached(refresh=refresh), steps=10)
    assert [step.index for step in record.steps if step.kind == "dense"] == full
    shape = {"references": [(192, 128)], "output": (128, 128), "steps": 10, "text_tokens": record.layout.text}
    setting = sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=refresh))
    assert list(sra.estimate(CASES["kontext"].build().transformer, config=setting, **shape).kinds) == [
        step.kind for step in record.steps
    ]


@torch.no_grad()
def test_drift_is_what_keys_and_values_moved_by_and_decides() -> None:
    calls, record = run("kontext", cached(refresh=sra.Drift(1e-6, at_most_every=3)), steps=8)
    full = [step.index for step in record.steps if step.kind == "dense"]
    assert full == [0, 1, 4, 7]  # far beyond the threshold: as often as is allowed
    for earlier, later in pairwise(full):
        moved = []
        for old, new in zip(calls[earlier].attention, calls[later].attention, strict=True):
            rows = [(x[:, -96:].double(), y[:, -96:].double()) for x, y in ((old.k, new.k), (old.v, new.v))]
            moved.append(max(float((y - x).norm() / y.norm()) for x, y in rows))
        torch.testing.assert_close(record.steps[later].drift.double(), torch.tensor(moved).double(), rtol=1e-5, atol=0)
    _, record = run("kontext", cached(refresh=sra.Drift(1e6, at_least_every=5)), steps=8)
    assert [step.index for step in record.steps if step.kind == "dense"] == [0, 1, 6]  # age alone


@pytest.mark.parametrize("name", ["kontext", "qwen_edit_plus", "klein"])
@torch.no_grad()
def test_a_ranking_measured_in_a_full_step_is_read_from_then_on(name: str) -> None:
    """Mass of the first step; the ranked tokens of the model that never heard of a cache."""
    setting = sra.SparseRef(sra.AttentionMass("all"), 0.25, execute=sra.Cache(refresh=sra.At((2,))))
    calls, record = run(name, setting, steps=4)
    assert [step.kind for step in record.steps] == ["profile", "cached", "dense", "cached"]
    plain = run(name, sra.SparseRef(sra.AttentionMass("all"), 0.25), steps=4)[1]
    assert all(torch.equal(a, b) for a, b in zip(record.scores, plain.scores, strict=True))
    kept = torch.zeros(record.layout.reference_tokens).bool()
    kept[plain.steps[1].selection.indices] = True
    fresh = CASES[name].model()
    for i in (1, 3):
        wanted = with_keys_of(fresh, calls[i].given, calls[i - 1], kept)
        assert error(calls[i].sample[:, :GENERATION], wanted[:, :GENERATION]) < ROUNDING


@torch.no_grad()
def test_a_step_between_profiling_steps_reads_everything() -> None:
    setting = sra.SparseRef(sra.AttentionMass("all", steps=(0, 2)), 0.25, execute=sra.Cache(refresh=sra.Never()))
    calls, record = run("kontext", setting, steps=4)
    assert [(step.kind, step.kept) for step in record.steps] == [
        ("profile", 96), ("cached", 96), ("profile", 96), ("cached", 24),
    ]  # fmt: skip
    wanted = with_keys_of(CASES["kontext"].build().transformer, calls[1].given, calls[0])
    assert error(calls[1].sample[:, :GENERATION], wanted[:, :GENERATION]) < ROUNDING


@torch.no_grad()
def test_ranked_again_on_stored_keys() -> None:
    setting = sra.SparseRef(sra.AttentionMass("all"), 0.25, execute=sra.Cache(refresh=sra.Never(), rerank_every=2))
    _, record = run("kontext", setting, steps=5)
    assert [step.kind for step in record.steps] == ["profile", *["cached"] * 4]
    assert [entry.step for entry in record.stability] == [2]
    assert record.steps[2].kept == 24  # it reads its budget, and measures all


@torch.no_grad()
def test_kept_rows_alone_may_be_computed() -> None:
    calls, record = run("kontext", cached(0.25, first="kept", refresh=sra.Every(2)), steps=4)
    assert [(step.kind, step.kept) for step in record.steps] == [("sparse", 24), ("cached", 24)] * 2
    assert [call.reached["hidden_states"].shape[1] for call in calls] == [GENERATION + 24, GENERATION] * 2
    keys = {a.k.shape[1] - call.text for call in calls for a in call.attention}
    assert keys == {GENERATION + 24}
    plain, _ = run("kontext", sra.SparseRef(sra.FromFunction(noise), 0.25), steps=4)
    assert torch.equal(calls[0].sample, plain[0].sample)


def test_what_is_stored_is_freed() -> None:
    """With the last step, with the run, and with the patch; and only rows that a later step reads are held."""
    case, pipe = CASES["kontext"], CASES["kontext"].build()
    with sra.patched(pipe, cached(0.25, refresh=sra.Never())) as handle:
        store = handle._generations.store
        case.call(pipe, steps=4)
        run = handle._generations.run
        assert [branch.held for branch in store._branches[run]] == [None]
        row = 2 * 4 * 2 * 16 * 4  # k and v, layers, heads, channels, bytes
        room = 2 * 2 * 2 * 16 * 4 * (handle.record.layout.text + GENERATION)
        assert [step.cache_bytes for step in handle.record.steps] == [24 * row + room] * 4
        assert handle.record.dense_cache_bytes == 96 * row

        def stop(pipe: Any, step: int, time: Any, values: dict) -> dict:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            case.call(pipe, steps=4, callback=stop)
        (branch,) = store._branches[handle._generations.run]
        held = weakref.ref(branch.held)
        assert held() is not None
        del branch, run
        case.call(pipe, steps=4, seed=3)
        gc.collect()
        assert held() is None
    assert not store._branches


def test_a_call_that_is_broken_off_leaves_nothing_to_read() -> None:
    case, pipe = CASES["klein"], CASES["klein"].build()
    dense = case.call(pipe, steps=3)
    with sra.patched(pipe, cached(refresh=sra.Never())) as handle:
        wanted = case.call(pipe, steps=3)

        def fail(*args: Any) -> None:
            raise RuntimeError("broken off")

        hook = pipe.transformer.single_transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken off"):
            case.call(pipe, steps=3)
        hook.remove()
        assert np.array_equal(case.call(pipe, steps=3), wanted)
        assert handle.record.steps[0].kind == "dense"
    assert np.array_equal(case.call(pipe, steps=3), dense)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sra.Every(0), "n must be a number of steps of at least 1, or a share"),
        (lambda: sra.Every(1.5), r"n as a share of the run must lie in \(0, 1\), got 1.5"),
        (lambda: sra.Every(2, warmup=0), "warmup must be a number of steps of at least 1, got 0"),
        (lambda: sra.At(()), "at least one, got .*Never\\(\\) computes them in the first step alone"),
        (lambda: sra.At("12"), "takes the steps"),
        (lambda: sra.Drift(0.0), "threshold must be a relative change above 0, got 0.0"),
        (lambda: sra.Drift(0.1, at_most_every=4, at_least_every=3), "no smaller than at_most_every, got 3 and 4"),
        (lambda: sra.Cache(refresh=4), "refresh must be an Every, At, Never or Drift, got 4"),
        (lambda: sra.SparseRef("grid", refresh=sra.Never()), 'refresh goes with execute="cache" or "both" only'),
    ],
)
def test_settings_without_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_run_of_one_step_has_no_drift() -> None:
    case, pipe = CASES["kontext"], CASES["kontext"].build()
    wanted = case.call(pipe, steps=1)
    with sra.patched(pipe, cached(refresh=sra.Drift(0.1))):
        with pytest.raises(ConfigError, match="a run must have at least 2 steps, got 1"):
            case.call(pipe, steps=1)
        assert np.array_equal(case.call(pipe, steps=2), case.call(CASES["kontext"].build(), steps=2))
    assert np.array_equal(case.call(pipe, steps=1), wanted)


def test_a_loop_that_does_not_tell_its_steps_counts_in_steps() -> None:
    """A default that knows no number of steps, and one that cannot do without."""
    pipe = CASES["kontext"].build()
    with witnessed(pipe.transformer) as calls:
        CASES["kontext"].call(pipe, steps=6)
    fresh = CASES["kontext"].build().transformer
    shares = pytest.raises(ConfigError, match="counts in shares of a run needs the run's number of steps")
    with sra.patched(fresh, cached(refresh=sra.Every(0.25))), shares:
        fresh(**calls[0].given)
    with sra.patched(fresh, ALL) as handle:
        for call in calls:
            fresh(**call.given)
        assert [step.kind for step in handle.record.steps] == [
            "dense", "cached", "cached", "cached", "dense", "cached",
        ]  # fmt: skip


def test_a_configuration_travels_through_json() -> None:
    for refresh in (None, sra.Every(0.25, warmup=2, last=1), sra.At((1, 0.5)), sra.Never(), sra.Drift(0.1, 3, 9)):
        setting = sra.SparseRef("mass", 0.5, execute=sra.Cache(refresh=refresh))
        assert sra.SparseRef.from_json(setting.to_json()) == setting
    with pytest.raises(ConfigError, match="a refresh must be one of Every, At, Never, Drift, got 'Often'"):
        sra.SparseRef.from_dict(setting.to_dict() | {"refresh": {"kind": "Often"}})
