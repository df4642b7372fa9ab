"""A run that is broken off, wherever it is, leaves the pipeline patched and whole: the next run is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.selection import References
from tests.contract import patched
from tests.contract.state import ALL, GRID, MASS, kinds, state, steps
from tests.pairwise import pairwise
from tests.pipelines import CASES, Case

MODELS = {name: CASES[name] for name in ("kontext", "klein_kv", "qwen_edit_plus")}


class BrokenOffError(Exception):
    pass


def in_callback(pipe: Any, step: int) -> dict[str, Any]:
    def stop(pipe: Any, index: int, timestep: Any, kwargs: dict) -> dict:
        if index == step:
            raise BrokenOffError
        return kwargs

    return {"callback": stop}


def in_block(pipe: Any, step: int) -> dict[str, Any]:
    """In the last block of the call `step`, inside the profiling step if that is 0."""
    calls = []
    block = getattr(pipe.transformer, "single_transformer_blocks", pipe.transformer.transformer_blocks)[-1]

    def stop(module: torch.nn.Module, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == step + 1:
            hook.remove()
            raise BrokenOffError

    hook = block.register_forward_hook(stop)
    return {}


def in_embedding(pipe: Any, step: int) -> dict[str, Any]:
    """After the library's pre-hook, before any block."""
    calls = []

    def stop(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == step + 1:
            hook.remove()
            raise BrokenOffError

    hook = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    return {}


@pairwise(case=MODELS, where=[in_callback, in_block, in_embedding], step=[0, 1])
def test_broken_off(case: Case, where: Callable[[Any, int], dict[str, Any]], step: int) -> None:
    pipe = case.build()
    case.call(pipe, steps=1)
    handle = sra.patch(pipe, MASS)
    before = state(pipe)
    with pytest.raises(BrokenOffError):
        case.call(pipe, **where(pipe, step))
    assert state(pipe) == before  # no private backend is left on a processor
    image = case.call(pipe, first=5)
    wanted, kept = patched.run(case, MASS, first=5)
    assert np.array_equal(image, wanted)
    assert steps(handle) == kept
    handle.remove()
    assert np.array_equal(case.call(pipe), case.dense())


def test_compiled_blocks_compile_again_after_a_broken_profiling_step() -> None:
    """The profiling step runs under a process-wide stance of the compiler, which must not outlive it."""
    case = CASES["klein"]
    pipe = case.build(layers=1, single=1)
    sra.patch(pipe, MASS)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(BrokenOffError):
        case.call(pipe, **in_embedding(pipe, 0))
    graphs = []

    @torch.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    double(torch.ones(3))
    assert graphs
    torch._dynamo.reset()


def test_a_selector_that_raises() -> None:
    case = CASES["klein"]
    fail = True

    def score(references: References) -> list[torch.Tensor]:
        if fail:
            raise BrokenOffError
        return [torch.arange(size) for size in references.sizes]

    pipe = case.build()
    case.call(pipe, steps=1)
    handle = sra.patch(pipe, sra.SparseRef(sra.FromFunction(score), 0.25))
    before = state(pipe)
    with pytest.raises(BrokenOffError):
        case.call(pipe)
    assert state(pipe) == before
    with pytest.raises(sra.SparseRefError, match="a run with reference images must have taken place"):
        handle.summary()
    fail = False
    assert (case.call(pipe) == patched.picture(case, sra.SparseRef(sra.FromFunction(score), 0.25))).all()
    assert kinds(handle) == ["sparse"] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [GRID, MASS], ids=["grid", "mass"])
def test_latents_that_are_not_finite(value: float, config: sra.SparseRef) -> None:
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, config)
    before = case.call(pipe)
    assert kinds(handle)[1] == "sparse"
    latents = torch.zeros(1, 4, 16, 24)
    latents[0, 2, 5, 7] = value
    with pytest.raises(sra.NonFiniteError, match="the references' latents must be finite, got NaN or infinity"):
        case.call(pipe, image=latents)
    with pytest.raises(sra.SparseRefError):
        _ = handle.record
    assert np.array_equal(before, case.call(pipe))


def test_attention_that_is_not_finite() -> None:
    case = CASES["klein"]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef(sra.AttentionMass(), 0.25))
    before = case.call(pipe)
    weight = pipe.transformer.single_transformer_blocks[-1].attn.norm_k.weight
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(sra.NonFiniteError, match="scores of AttentionMass must be finite"):
        case.call(pipe)
    weight.data.copy_(kept)
    assert np.array_equal(before, case.call(pipe))
    assert kinds(handle) == ["profile", "sparse", "sparse"]


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (sra.SparseRef("grid", 97), sra.BudgetError, "97"),
        (sra.SparseRef("grid", 0.5, floor=500), sra.BudgetError, "floor must not exceed reference 0's 96 tokens"),
        (
            sra.SparseRef("grid", 0.5, weights=(1, 2, 3)),
            sra.ConfigError,
            "weights must be one a reference, got 3 for 1",
        ),
        (sra.SparseRef(sra.AttentionMass(steps=(7,)), 0.5), sra.ConfigError, "profiling steps must lie within"),
        (sra.SparseRef(sra.FromFunction(lambda r: [torch.ones(3)]), 0.5), sra.ConfigError, "one score a token"),
    ],
)
def test_settings_that_do_not_fit_the_references(config: sra.SparseRef, error: type, words: str) -> None:
    case = CASES["klein"]
    pipe = case.build()
    case.call(pipe, steps=1)
    before = state(pipe)
    handle = sra.patch(pipe, config)
    on = state(pipe)
    with pytest.raises(error, match=words):
        case.call(pipe)
    assert state(pipe) == on
    case.call(pipe, references=0)
    handle.remove()
    assert state(pipe) == before


def test_after_an_interruption_from_the_keyboard() -> None:
    """torch calls no hook then: what the profiling step left is taken off at the next call, or by `remove`."""
    case = CASES["klein"]

    def interrupt(module: torch.nn.Module, args: Any, output: Any) -> None:
        raise KeyboardInterrupt

    for recover in ("call", "remove"):
        pipe = case.build()
        case.call(pipe, steps=1)
        before = state(pipe)
        handle = sra.patch(pipe, ALL)
        hook = pipe.transformer.transformer_blocks[0].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            case.call(pipe)
        hook.remove()
        if recover == "call":
            assert np.array_equal(case.dense(), case.call(pipe))
            assert kinds(handle)[0] == "profile"
        handle.remove()
        assert state(pipe) == before
        assert np.array_equal(case.dense(), case.call(pipe))
