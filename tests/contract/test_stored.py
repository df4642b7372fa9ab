"""The patch contract where the library stores reference keys and values: nothing is left behind, nothing stale read."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import sparse_ref_attn as sra
from sparse_ref_attn.errors import BudgetError, IncompatibleError
from sparse_ref_attn.patching.execution import room
from sparse_ref_attn.reference_cache import RankedCache
from tests.adapters.test_masks_plain import Masked
from tests.contract import patched
from tests.contract.state import kinds, state
from tests.contract.test_offload import by_model, sequential
from tests.pipelines import CASES
from tests.test_batch import Items, record

STEPS = 4
SETTINGS = {
    "all read": sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.At((2,)))),
    "ranked": sra.SparseRef("mass", sra.Linear(0.2, 0.6), execute=sra.Cache(refresh=sra.Never())),
    "kept": sra.SparseRef("grid", 0.3, execute=sra.Cache("kept", refresh=sra.Drift(0.5))),
    "tiles": sra.SparseRef("mass", 0.25, execute=sra.Cache(per="tile", tile=3, cell=3, refresh=sra.At((2,)))),
}
models = pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
each = pytest.mark.parametrize("setting", list(SETTINGS.values()), ids=list(SETTINGS))


@pytest.mark.parametrize(
    ("name", "setting"), list(zip(["klein", "qwen_edit_plus", "kontext", "klein"], SETTINGS, strict=True))
)
def test_runs_repeat_know_nothing_of_one_another_and_are_undone(name: str, setting: str) -> None:
    case, config = CASES[name], SETTINGS[setting]
    pipe, most = case.build(), max(case.references)
    case.call(pipe, steps=1)
    dense, before = case.dense(steps=STEPS), state(pipe)
    wanted = {seed: patched.picture(case, config, steps=STEPS, seed=seed, first=50 * seed) for seed in (0, 9)}
    handle = sra.patch(pipe, config)
    on = state(pipe)
    for seed in (0, 9):
        assert np.array_equal(case.call(pipe, steps=STEPS, seed=seed, first=50 * seed), wanted[seed])
        assert state(pipe) == on
    case.call(pipe, steps=STEPS, references=most)
    assert np.array_equal(case.call(pipe, steps=STEPS), wanted[0])
    handle.remove()
    assert state(pipe) == before
    assert np.array_equal(case.call(pipe, steps=STEPS), dense)
    assert not np.array_equal(wanted[0], dense)


@each
@pytest.mark.parametrize("step", [0, 1])
def test_an_exception_in_a_block_leaves_nothing_behind(setting: sra.SparseRef, step: int) -> None:
    case = CASES["kontext"]
    pipe = case.build()
    case.call(pipe, steps=1)
    before = state(pipe)
    handle = sra.patch(pipe, setting)
    on, sparse, calls = state(pipe), patched.picture(case, setting, steps=STEPS, seed=0, first=0), []

    def burst(module: Any, args: Any) -> None:
        calls.append(module)
        if len(calls) == step + 1:
            raise RuntimeError("burst")

    hook = pipe.transformer.single_transformer_blocks[1].register_forward_pre_hook(burst)
    with pytest.raises(RuntimeError, match="burst"):
        case.call(pipe, steps=STEPS)
    hook.remove()
    assert state(pipe) == on
    assert np.array_equal(case.call(pipe, steps=STEPS), sparse)
    handle.remove()
    assert state(pipe) == before
    assert np.array_equal(case.call(pipe, steps=STEPS), case.dense(steps=STEPS))


@pytest.mark.parametrize(
    ("name", "offload"), [("kontext", by_model), ("klein", sequential), ("qwen_edit_plus", by_model)]
)
def test_through_offload(name: str, offload: Callable[[Any], None]) -> None:
    case, setting = CASES[name], SETTINGS["all read"]
    wanted = patched.picture(case, setting, steps=STEPS, seed=0, first=0)
    pipe = case.build()
    offload(pipe)
    handle = sra.patch(pipe, setting)
    for _ in range(2):
        assert np.array_equal(case.call(pipe, steps=STEPS), wanted)
    handle.remove()
    assert np.array_equal(case.call(pipe), case.dense())


@pytest.mark.parametrize(
    ("name", "setting"), [("kontext", "all read"), ("klein", "tiles"), ("qwen_edit_plus", "all read")]
)
def test_a_copy_made_within_a_run_takes_nothing_along(name: str, setting: str) -> None:
    case = CASES[name]
    pipe = case.build()
    size = len(_pickled(pipe.transformer))
    copies: list[Any] = []

    def make(pipe: Any, step: int, time: Any, values: dict) -> dict:
        if step == 0:
            copies.append(copy.deepcopy(pipe.transformer))
            assert len(_pickled(pipe.transformer)) < size + 10_000  # hooks of no weight
        return {}

    with sra.patched(pipe, SETTINGS[setting]):
        case.call(pipe, steps=STEPS, callback=make)
        other = case.build()
        other.transformer = copies[0]
        assert np.array_equal(case.call(other, steps=STEPS), case.dense(steps=STEPS))


def _pickled(model: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


@contextmanager
def poisoned() -> Iterator[list[int]]:
    """Inside, what a run has stored is spoiled when the next run begins to store."""
    alive: list[RankedCache] = []
    store = RankedCache.store

    def spoiling(self: RankedCache, layer: int, *given: Any) -> None:
        for each in alive:
            if each is not self:
                for pair in each._buffers.values():
                    for buffer in pair:
                        buffer.fill_(torch.nan)
        if self not in alive:
            alive.append(self)
        store(self, layer, *given)

    RankedCache.store = spoiling  # type: ignore[method-assign]
    try:
        yield []
    finally:
        RankedCache.store = store  # type: ignore[method-assign]


@models
def test_a_planted_stale_store_is_never_read(name: str) -> None:
    """Broken-off runs, another prompt, another seed: whatever they stored is NaN when the next one stores."""
    case, pipe = CASES[name], CASES[name].build()

    def stop(pipe: Any, step: int, time: Any, values: dict) -> dict:
        raise KeyboardInterrupt

    with sra.patched(pipe, SETTINGS["all read"]), poisoned():
        for seed in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                case.call(pipe, steps=STEPS, callback=stop)
            assert np.isfinite(case.call(pipe, steps=STEPS, seed=seed, first=7 * seed)).all()


@torch.no_grad()
def test_a_loop_that_calls_the_model_twice_a_step() -> None:
    """As a second-order solver does: each of the two calls reads what its own of the full step stored."""
    model, calls = CASES["klein"].build().transformer, []
    pipe = CASES["klein"].build()
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(dict(k)), with_kwargs=True)
    CASES["klein"].call(pipe, steps=4)
    hook.remove()
    given = [call | {"encoder_hidden_states": calls[0]["encoder_hidden_states"]} for call in calls]
    once = sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Never()))

    def read(*order: tuple[int, int]) -> torch.Tensor:
        with sra.patched(model, once) as handle:
            handle.begin(steps=2)
            for step, i in order:
                handle.step(step)
                out = model(**given[i])[0]
        return out

    assert torch.equal(read((0, 0), (0, 1), (1, 2), (1, 3)), read((0, 1), (1, 3)))
    assert not torch.equal(read((0, 0), (0, 1), (1, 2), (1, 3)), read((0, 0), (1, 3)))


def test_strength_that_starts_late() -> None:
    """An inpainting run of fewer steps: its first one computes."""
    case, pipe = CASES["kontext_inpaint"], CASES["kontext_inpaint"].build()
    with sra.patched(pipe, sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Never()))) as handle:
        case.call(pipe, steps=6, strength=0.5)
        assert kinds(handle) == ["dense", "cached", "cached"]


@pytest.mark.parametrize("per", ["run", "tile"])
@pytest.mark.parametrize("name", ["kontext", "qwen_edit_plus"])
def test_with_gradients(name: str, per: str) -> None:
    """What is read is no part of the graph; the call's own rows are. Of tiles the op's definition attends."""
    config = {
        "run": sra.SparseRef("grid", 0.3, execute=sra.Cache(refresh=sra.Never())),
        "tile": sra.SparseRef("mass", 0.25, execute=sra.Cache(per="tile", tile=3, cell=3, refresh=sra.Never())),
    }[per]
    case = CASES[name]
    pipe, calls = case.build(), []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(dict(k)), with_kwargs=True)
    case.call(pipe, steps=2)
    hook.remove()
    samples = []
    for grad in (False, True):
        model = case.build().transformer.requires_grad_()
        handle = sra.patch(model, config)
        handle.begin(steps=2)
        with torch.set_grad_enabled(grad):
            model(**calls[0])
            handle.step(1)
            samples.append(model(**calls[1])[0])
    torch.testing.assert_close(samples[1].detach(), samples[0], rtol=1e-4, atol=1e-5)
    samples[1].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@models
def test_in_a_batch_each_item_has_its_own(name: str) -> None:
    """Other references, prompts and steps; items with stored references run by themselves."""
    case, pipe = CASES[name], CASES[name].build()
    items = Items(case, pipe)
    want, steps = items.alone(SETTINGS["all read"])
    done = items.together(SETTINGS["all read"])
    for got, alone in zip(done.images, want, strict=True):
        assert np.array_equal(got, alone)
    assert [record(h) if images else [] for h, images in zip(done.handles, items.images, strict=True)] == steps


def test_a_step_cache_goes_with_references_that_are_computed_once() -> None:
    case = CASES["qwen_edit_plus"]
    pipe = case.build(layers=3)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    words = r'computed in the first step alone \("fast", Cache\(refresh=Never\(\)\)\), got At'
    with sra.patched(pipe, SETTINGS["all read"]), pytest.raises(IncompatibleError, match=words):
        case.call(pipe, steps=STEPS)
    once = sra.SparseRef("grid", 0.5, execute=sra.Cache(refresh=sra.Never()))
    with sra.patched(pipe, once) as handle:
        assert np.isfinite(case.call(pipe, steps=STEPS)).all()
        assert kinds(handle) == ["dense", "cached", "cached", "cached"]


def test_compiled_blocks_of_a_kind_that_nobody_knows_run_uncompiled_and_it_is_said() -> None:
    """A processor of somebody's own may attend more than once in a layer."""
    case = CASES["klein"]
    pipe = case.build()
    with sra.patched(pipe, SETTINGS["all read"]):
        wanted = case.call(pipe, steps=STEPS)
    own = pipe.transformer.transformer_blocks[0].attn.processor
    own.__class__ = type("MyProcessor", (type(own),), {})
    torch._dynamo.reset()
    with sra.patched(pipe, SETTINGS["all read"]) as handle:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        np.testing.assert_allclose(case.call(pipe, steps=STEPS), wanted, atol=1e-5)
        assert "compiled blocks run uncompiled where keys and values are stored or read" in handle.notes
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["all read", "kept", "tiles"])
def test_a_run_that_cannot_fit_is_refused_before_its_first_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is really held: one byte less than that is too little."""
    case = CASES["klein"]
    pipe, calls = case.build(), []
    with sra.patched(pipe, SETTINGS[name]) as handle:
        case.call(pipe, steps=STEPS)
        held = max(step.cache_bytes for step in handle.record.steps)
        monkeypatch.setattr(room, "free_bytes", lambda device: held)
        case.call(pipe, steps=STEPS)
        pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *args: calls.append(args))
        monkeypatch.setattr(room, "free_bytes", lambda device: held - 1)
        words = r"must fit into what is free on cpu, got .* GB: give smaller references"
        with pytest.raises(BudgetError, match=words):
            case.call(pipe, steps=STEPS)
        assert not calls


class Windowed(Masked):
    """Its last layer lets the text and the image look at themselves alone."""

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image = super().forward(x, text)
        q, k, v = self.qkv[0](image).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return image + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_a_layer_that_does_not_attend_over_all_rows_is_told() -> None:
    """There is nothing to store of it, and nothing stored is read."""
    model, x, text = Windowed().eval(), torch.randn(2, 112, 32), torch.randn(2, 12, 32)
    references, wanted = (sra.Reference(64, 48, (6, 8)),), model(x=x, text=text)
    for kinds_, error in ((["single"] * 3, IncompatibleError), (["single", "single", "other"], None)):
        adapter = sra.PlainAdapter("x", lambda kwargs: ((0, 64), references), text="text", attention=kinds_)
        with sra.patched(model, SETTINGS["all read"], adapter=adapter) as handle:
            handle.begin(steps=2)
            if error is None:
                assert torch.equal(model(x=x, text=text), wanted)
                handle.step(1)
                assert torch.isfinite(model(x=x, text=text)).all()
                assert kinds(handle) == ["dense", "cached"]
                continue
            for _ in range(2):
                with pytest.raises(error, match="each of the 3 attention layers must attend over all rows"):
                    model(x=x, text=text)
    assert torch.equal(model(x=x, text=text), wanted)


def test_attention_that_cannot_be_answered_is_refused() -> None:
    class Blind:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    pipe = CASES["kontext"].build()
    before = state(pipe)
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.processor = Blind(attention.processor)
    words = r'execute="cache" stores keys.*attention must be known.*execute="tokens"'
    with pytest.raises(IncompatibleError, match=words):
        sra.patch(pipe, SETTINGS["all read"])
    attention.processor = attention.processor.inner
    assert state(pipe) == before


def test_a_patched_pipeline_that_is_collected_leaves_no_backend() -> None:
    other, pipe = CASES["klein"].build(), CASES["klein"].build()
    before = state(other)
    sra.patch(pipe, SETTINGS["all read"])
    CASES["klein"].call(pipe, steps=2)
    assert state(other) != before
    del pipe
    gc.collect()
    assert state(other) == before
