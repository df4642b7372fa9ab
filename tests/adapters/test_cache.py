"""Klein-KV's cache in rank order: what each step attends to, what is held, and what is left of the pipeline's own."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.schedules import Budget
from tests.adapters.test_dropping import ROUNDING, error, noise, scores
from tests.adapters.witnesses import GENERATION, LATENT, best, hidden_keys, witnessed
from tests.pipelines import CASES

CASE = CASES["klein_kv"]
LAYERS = 4
PIXELS = 1e-4  # of an image in [0, 1]: the same, but for the order of sums


def config(budget: Budget | float, execute: str = "cache", **settings: Any) -> sra.SparseRef:
    return sra.SparseRef(sra.FromFunction(noise), budget, execute, **settings)


def run(setting: sra.SparseRef, **request: Any) -> tuple[list, Any]:
    """Calls and record of one run."""
    pipe = CASE.build()
    with sra.patched(pipe, setting) as handle, witnessed(pipe.transformer) as calls:
        CASE.call(pipe, **LATENT, **request)
    return calls, handle.record


BUDGETS = {
    "constant": (sra.Constant(0.3), (0.3,) * 4),
    "rising": (sra.Linear(0.1, 0.5), (0.1, 0.1 + 0.4 / 3, 0.1 + 0.8 / 3, 0.5)),
    "falling": (sra.Descending(0.6, 0.1, 1.0), (0.6, 0.1 + 1 / 3, 0.1 + 0.5 / 3, 0.1)),
    "up and down": (sra.Pieces((0.2, 0.5, 0.1, 0.4), (0.2, 0.5, 0.8)), (0.2, 0.5, 0.1, 0.4)),
}


@pytest.mark.parametrize(("name", "references"), zip(BUDGETS, (1, 3, 1, 3), strict=True))
@torch.no_grad()
def test_each_step_attends_to_its_own_budget_of_exact_keys(name: str, references: int) -> None:
    """The first step is the dense one bit for bit; each later one is the dense model that does not see dropped keys."""
    budget, shares = BUDGETS[name]
    calls, record = run(config(budget), references=references, steps=4, batch=2)
    fresh, sizes = CASE.model(), record.layout.sizes
    extract, *later = calls
    wanted, cache = fresh(**extract.given)
    assert torch.equal(extract.sample, wanted)
    assert [(step.kind, step.kept) for step in record.steps[:1]] == [("dense", sum(sizes))]
    for call, share, step in zip(later, shares[1:], record.steps[1:], strict=True):
        kept = best(scores(sizes), sizes, share)
        assert (step.kind, step.kept) == ("cached", int(kept.sum()))
        assert call.reached["kv_cache"] is None  # attention is given the prefix; nothing is concatenated
        assert {a.k.shape[1] for a in call.attention} == {call.text + GENERATION + int(kept.sum())}
        with hidden_keys(call, kept, references_first=True):
            wanted = fresh(**call.given | {"kv_cache": cache})[0]
        assert error(call.sample, wanted) < ROUNDING
        assert error(call.sample, fresh(**call.given | {"kv_cache": cache})[0]) > 100 * ROUNDING


@pytest.mark.parametrize("execute", ["cache", "both"])
@torch.no_grad()
def test_layers_may_differ(execute: str) -> None:
    factors = (1.0, 0.5, 0.25, 0.8)
    calls, record = run(config(sra.Linear(0.2, 0.6), execute, layers=factors), references=2, steps=3)
    counts = [[max(1, int(share * size + 0.5 + 1e-9)) for size in record.layout.sizes] for share in (0.2, 0.4, 0.6)]
    for call, step, kept in zip(calls[1:], record.steps[1:], counts[1:], strict=True):
        wanted = tuple(sum(math.ceil(factor * count) for count in kept) for factor in factors)
        assert step.layers == wanted
        assert [a.k.shape[1] - call.text - GENERATION for a in call.attention] == list(wanted)


@torch.no_grad()
def test_a_layer_reads_its_best_tokens() -> None:
    """Every layer at half of 60 % is every layer at 30 %."""
    half, _ = run(config(0.6, layers=(0.5,) * LAYERS), references=2)
    whole, _ = run(config(0.3), references=2)
    for one, other in zip(half[1:], whole[1:], strict=True):
        assert error(one.sample, other.sample) < ROUNDING


def test_keeping_all_is_the_pipelines_own_cache_bit_for_bit() -> None:
    pipe = CASE.build()
    dense = CASE.call(pipe, references=3, batch=2)
    for execute in ("cache", "both"):
        with sra.patched(pipe, config(1.0, execute)) as handle:
            assert np.array_equal(CASE.call(pipe, references=3, batch=2), dense)
            assert handle.record.steps[-1].cache_bytes == handle.record.dense_cache_bytes
    assert np.array_equal(CASE.call(pipe, references=3, batch=2), dense)


@torch.no_grad()
def test_a_step_that_keeps_all_between_others_is_bit_identical_to_the_dense_model() -> None:
    calls, record = run(config(sra.Pieces((0.2, 0.3, 1.0, 0.4), (0.2, 0.5, 0.8))), steps=4)
    assert [step.kept for step in record.steps] == [96, 29, 96, 38]
    fresh = CASE.model()
    _, cache = fresh(**calls[0].given)
    assert torch.equal(calls[2].sample, fresh(**calls[2].given | {"kv_cache": cache})[0])
    held = [step.cache_bytes for step in record.steps]
    assert held[2] > held[3]  # the pipeline's own rows are needed no more


@pytest.mark.parametrize("profile", [0, 1])
@torch.no_grad()
def test_measured_rankings(profile: int) -> None:
    """Mass measured in the extract step, or over the stored keys of a cached one, is that of the dense model."""
    pipe = CASE.build()
    setting = sra.SparseRef(sra.AttentionMass("all", steps=(profile,)), 0.25, "cache")
    with sra.patched(pipe, setting) as handle, witnessed(pipe.transformer) as calls:
        CASE.call(pipe, references=3)
    sizes, at = handle.record.layout.sizes, calls[profile].text
    blocks = [a.weights() for a in calls[profile].attention if a.q.shape[1] != sum(sizes)]
    assert len(blocks) == LAYERS
    if profile == 0:  # text | references | generation, of which the references' rows were left out of the queries
        columns = [w[:, :, at:, at : at + sum(sizes)] for w in blocks]
        wanted = torch.stack([c.mean((0, 1, 2)) for c in columns]).mean(0)
        torch.testing.assert_close(torch.cat(handle.record.mass).double(), wanted, rtol=1e-4, atol=1e-7)
    fresh = CASE.model()
    _, cache = fresh(**calls[0].given)
    with witnessed(fresh) as dense:
        fresh(**calls[profile].given | ({"kv_cache": cache} if profile else {}))
    columns = [a.weights()[:, :, at:, at : at + sum(sizes)] for a in dense[0].attention if a.q.shape[1] != sum(sizes)]
    wanted = torch.stack([c.mean((0, 1, 2)) for c in columns]).mean(0)
    torch.testing.assert_close(torch.cat(handle.record.mass).double(), wanted, rtol=1e-3, atol=1e-7)
    kept = [step.kept for step in handle.record.steps]
    assert kept == [256] * (profile + 1) + [64] * (2 - profile)
    assert not handle.notes


def test_the_ranked_rows_go_with_the_run() -> None:
    pipe = CASE.build()
    seen: list[weakref.ref] = []

    def note(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if kwargs.get("kv_cache") is not None:
            seen.append(weakref.ref(kwargs["kv_cache"].get_double(0).get()[0]))

    pipe.transformer.register_forward_pre_hook(lambda m, a, k: note(m, a, k, None), with_kwargs=True, prepend=True)
    with sra.patched(pipe, config(0.25)):
        CASE.call(pipe)
        gc.collect()
        assert len(seen) == 2
        assert all(ref() is None for ref in seen)


def tensors_alive() -> int:
    """Bytes of every storage that lives."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if type(x) is Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_follows_the_budget() -> None:
    """What the record says is saved is what is alive less than in a run with the pipeline's own cache."""
    pipe = CASE.build(heads=4, head_dim=32)
    sizes = ((192, 192), (192, 192), (192, 192))
    alive: list[int] = []

    def look(pipe: Any, step: int, time: Any, values: dict) -> dict:
        alive.append(tensors_alive())
        return {}

    call = {"references": 3, "sizes": sizes, "callback": look, "steps": 3, **LATENT}
    CASE.call(pipe, **call)
    dense = list(alive)
    for execute, share in (("cache", 0.1), ("cache", 0.5), ("both", 0.25)):
        alive.clear()
        with sra.patched(pipe, config(share, execute)) as handle:
            CASE.call(pipe, **call)
        record = handle.record
        assert record.dense_cache_bytes == 2 * LAYERS * 3 * 576 * 4 * 32 * 4
        rows = record.dense_cache_bytes * share
        room = 2 * (LAYERS / 2) * (record.layout.text + 64) * 4 * 32 * 4
        for step, held, before in zip(record.steps, alive, dense, strict=True):
            assert step.cache_bytes == pytest.approx(rows + room, rel=0.01), (execute, share)
            margin = 0.03 * record.dense_cache_bytes  # scores, positions, the run's reference tokens
            saved = record.dense_cache_bytes - step.cache_bytes
            assert before - held == pytest.approx(saved, abs=margin), (execute, share)
        del handle, record


def test_memory_follows_the_largest_budget_still_to_come() -> None:
    _, record = run(config(sra.Pieces((1.0, 0.8, 0.4, 0.1), (0.2, 0.5, 0.8))), steps=4, references=3)
    held = [step.cache_bytes for step in record.steps[1:]]
    row = record.dense_cache_bytes // record.layout.reference_tokens
    kept = [step.kept for step in record.steps[1:]]
    room = 2 * (LAYERS // 2) * (record.layout.text + GENERATION) * (row // (2 * LAYERS))
    assert held == [row * count + room for count in kept]
    _, rising = run(config(sra.Linear(0.1, 0.5)), steps=4, references=3)
    assert len({step.cache_bytes for step in rising.steps}) == 1


def test_settings_without_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="a factor for each of the 4 attention layers, got 2"):
        sra.patch(CASE.build(), config(0.25, layers=(0.5, 1.0)))
    for settings in ({"layers": (0.5,), "execute": "tokens"}, {"layers": (0.0, 1.0)}, {"cache_rows": "some"}):
        with pytest.raises(ConfigError):
            config(0.25, **settings)
    with pytest.raises(ConfigError, match='a rival that changes tokens runs with execute="tokens" only'):
        sra.SparseRef(sra.ToMe(), 0.25, "cache")


@torch.no_grad()
def test_another_runs_cache_is_refused() -> None:
    pipe = CASE.build()
    with witnessed(pipe.transformer) as calls:
        CASE.call(pipe)
    extract, cached = calls[0].given, calls[1].given
    fresh = CASE.build().transformer
    _, other = fresh(**extract)
    handle = sra.patch(fresh, config(0.25))
    handle.begin(steps=2)
    _, cache = fresh(**extract)
    handle.step(1)
    with pytest.raises(LayoutError, match="that this run's first step stored, got others"):
        fresh(**cached | {"kv_cache": other})
    assert torch.isfinite(fresh(**cached | {"kv_cache": cache})[0]).all()


def test_a_handle_removed_within_a_run_leaves_a_cache_that_can_be_read() -> None:
    pipe = CASE.build()
    dense = CASE.call(pipe, steps=4)
    handle = sra.patch(pipe, config(0.25))

    def off(pipe: Any, step: int, time: Any, values: dict) -> dict:
        if step == 1:
            handle.remove()
        return {}

    with witnessed(pipe.transformer) as calls:
        image = CASE.call(pipe, steps=4, callback=off)
    assert np.isfinite(image).all()
    assert {a.k.shape[1] - calls[3].text - GENERATION for a in calls[3].attention} == {24}
    assert np.array_equal(CASE.call(pipe, steps=4), dense)
