"""The patch contract with ``execute="cache"``: Klein-KV comes back whole, whatever happened in between."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.hooks.diffusers.versions import dispatcher
from tests.contract import patched
from tests.contract.test_offload import by_model, sequential
from tests.pairwise import pairwise
from tests.pipelines import CASES

CASE = CASES["klein_kv"]
SETTINGS = {
    "ranked before": sra.SparseRef("grid", sra.Linear(0.1, 0.5), "cache"),
    "ranked by the first step": sra.SparseRef(sra.AttentionMass("all"), 0.3, "cache"),
    "both": sra.SparseRef("grid", 0.3, "both"),
    "ranked again": sra.SparseRef(sra.AttentionMass("all"), 0.3, "cache", rerank_every=1),
}
each = pytest.mark.parametrize("setting", list(SETTINGS.values()), ids=list(SETTINGS))


def state(pipe: Any) -> list[Any]:
    """What a patch touches for a moment: hooks, backends, and the tables that backends are looked up in."""
    gc.collect()  # pipelines of earlier tests leave the tables
    attentions = [b.attn for b in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks)]
    registry = dispatcher()._AttentionBackendRegistry
    return [
        [vars(attn.processor).get("_attention_backend", "inherited") for attn in attentions],
        [len(attn._forward_hooks) for attn in attentions],
        len(registry._backends), len(registry._constraints), len(registry._supported_arg_names),
    ]  # fmt: skip


@each
def test_runs_repeat_do_not_leak_and_are_undone(setting: sra.SparseRef) -> None:
    pipe = CASE.build()
    CASE.call(pipe, steps=1)
    before, alone = state(pipe), patched.picture(CASE, setting, references=2)
    first = {"references": 3, "first": 50, "seed": 9, "batch": 2}
    with sra.patched(pipe, setting):
        CASE.call(pipe, **first)  # other references, prompts and seed
        assert np.array_equal(CASE.call(pipe, references=2), alone)
        assert np.array_equal(CASE.call(pipe, references=2), alone)
        assert np.array_equal(CASE.call(pipe, references=0), CASE.dense(references=0))
        assert state(pipe) == before
    assert not np.array_equal(alone, CASE.dense(references=2))
    assert state(pipe) == before
    assert np.array_equal(CASE.call(pipe, references=2), CASE.dense(references=2))


@pairwise(setting=SETTINGS, step=[0, 1], block=[0, 1])
def test_an_exception_in_a_block_leaves_nothing_behind(setting: sra.SparseRef, step: int, block: int) -> None:
    pipe = CASE.build()
    CASE.call(pipe, steps=1)
    before = state(pipe)
    handle = sra.patch(pipe, setting)
    calls = []

    def burst(module: Any, args: Any) -> None:
        calls.append(module)
        if len(calls) == step + 1:
            raise RuntimeError("burst")

    hook = pipe.transformer.single_transformer_blocks[block].register_forward_pre_hook(burst)
    with pytest.raises(RuntimeError, match="burst"):
        CASE.call(pipe)
    hook.remove()
    assert state(pipe) == before
    assert np.array_equal(CASE.call(pipe), patched.picture(CASE, setting))
    handle.remove()
    assert state(pipe) == before
    assert np.array_equal(CASE.call(pipe), CASE.dense())


def test_two_pipelines_and_two_on_one_transformer() -> None:
    setting, other = SETTINGS["ranked before"], SETTINGS["both"]
    one, two = CASE.build(), CASE.build(seed=1)
    wanted = []
    for pipe, config in ((one, setting), (two, other)):
        with sra.patched(pipe, config):
            wanted.append(CASE.call(pipe))
    shared = diffusers.Flux2KleinKVPipeline(**one.components)
    shared.scheduler = copy.deepcopy(one.scheduler)
    shared.set_progress_bar_config(disable=True)
    dense_elsewhere = []

    def elsewhere(pipe: Any, step: int, time: Any, values: dict) -> dict:
        dense_elsewhere.append(CASE.call(two))
        return {}

    with sra.patched(one, setting), sra.patched(two, other):
        assert np.array_equal(CASE.call(one, callback=elsewhere), wanted[0])
        assert all(np.array_equal(image, wanted[1]) for image in dense_elsewhere)

        def within(pipe: Any, step: int, time: Any, values: dict) -> dict:
            if step == 0:
                assert np.isfinite(CASE.call(shared, references=2, first=30)).all()
            return {}

        # Another run on the same transformer in the middle of one: what is left of the first still has its own rows.
        assert np.isfinite(CASE.call(one, callback=within)).all()
        assert np.array_equal(CASE.call(one), wanted[0])


@pytest.mark.parametrize(("name", "offload"), list(zip(SETTINGS, [by_model, sequential] * 2, strict=True)))
def test_through_offload(name: str, offload: Callable[[Any], None]) -> None:
    setting = SETTINGS[name]
    wanted = patched.picture(CASE, setting, references=2)
    pipe = CASE.build()
    offload(pipe)
    handle = sra.patch(pipe, setting)
    for _ in range(2):
        assert np.array_equal(CASE.call(pipe, references=2), wanted)
    handle.remove()
    assert np.array_equal(CASE.call(pipe), CASE.dense())


def test_the_users_attention_backend_and_gradients() -> None:
    """Attention stays with the backend that the user chose; with gradients on, the model's own way reads the rows."""
    pipe, setting = CASE.build(), SETTINGS["ranked before"]
    with sra.patched(pipe, setting):
        wanted = CASE.call(pipe)
    pipe.transformer.set_attention_backend("_native_math")
    with sra.patched(pipe, setting):
        np.testing.assert_allclose(CASE.call(pipe), wanted, atol=1e-4)
        assert state(pipe)[0] == ["_native_math"] * 4
    fresh = CASE.build()
    calls: list[dict] = []
    fresh.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(dict(k)), with_kwargs=True)
    CASE.call(fresh, steps=2)
    samples = []
    for grad in (False, True):
        model = CASE.build().transformer.requires_grad_()
        handle = sra.patch(model, sra.SparseRef("grid", 0.3, "cache"))
        handle.begin(steps=2)
        with torch.set_grad_enabled(grad):
            _, cache = model(**calls[0])
            handle.step(1)
            samples.append(model(**calls[1] | {"kv_cache": cache})[0])
    assert samples[1].requires_grad
    torch.testing.assert_close(samples[1].detach(), samples[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_read_the_ranked_rows() -> None:
    pipe, setting = CASE.build(), SETTINGS["ranked before"]
    with sra.patched(pipe, setting):
        wanted = CASE.call(pipe)
    torch._dynamo.reset()
    with sra.patched(pipe, setting):
        pipe.transformer.compile_repeated_blocks(backend="eager")
        np.testing.assert_allclose(CASE.call(pipe), wanted, atol=1e-4)
