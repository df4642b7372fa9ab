"""Forwards that somebody replaced: what fails there where the length has just changed is explained."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.hooks.foreign import ExplainedSizes, foreign_code
from tests.contract.state import GRID, kinds, state
from tests.pairwise import pairwise
from tests.pipelines import CASES, Case, each_case

MODELS = {name: CASES[name] for name in ("klein", "kontext", "qwen_edit")}


def remembering(own: Callable[..., Any], kept: dict[str, Any]) -> Callable[..., Any]:
    """A forward that compares its input with that of the step before, as TeaCache does."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else next(a for a in args if torch.is_tensor(a))
        if "last" in kept:
            kept["change"] = float((x - kept["last"]).abs().mean())
        kept["last"] = x
        return own(*args, **kwargs)

    return forward


def on_a_block(pipe: Any, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    block = pipe.transformer.transformer_blocks[0]
    block.forward = remembering(block.forward, kept)


def on_the_model(pipe: Any, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = remembering(type(pipe.transformer).forward, kept)
    pipe.transformer.forward = types.MethodType(lambda self, **kwargs: forward(self, **kwargs), pipe.transformer)


def on_its_class(pipe: Any, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(pipe.transformer)
    monkeypatch.setattr(cls, "forward", remembering(cls.forward, kept))


def by_a_hook(pipe: Any, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = remembering(lambda *args, **kwargs: None, kept)
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(lambda module, args, kwargs: seen(*args, **kwargs), with_kwargs=True)


@each_case()
def test_the_published_models_have_none(case: Case) -> None:
    pipe = case.build()
    assert foreign_code(pipe.transformer) is None
    sra.patch(pipe, GRID)
    assert foreign_code(pipe.transformer) is None


@pairwise(case=MODELS, put=[on_a_block, on_the_model, on_its_class, by_a_hook], first=["patch", "cache"])
def test_a_step_cache_of_its_own(case: Case, put: Callable, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kept = case.build(), {}
    case.call(pipe, steps=1)
    if first == "cache":
        put(pipe, kept, monkeypatch)
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.25))
    if first == "patch":
        put(pipe, kept, monkeypatch)
    before = state(pipe)
    words = r"Transformer.*TeaCache.*schedules\.Constant.*must match"
    with pytest.raises(sra.IncompatibleError, match=words) as caught:
        case.call(pipe)
    assert type(caught.value.__cause__) is RuntimeError
    assert kinds(handle) == ["profile", "sparse"]
    assert state(pipe) == before
    kept.clear()
    handle = sra.patch(pipe, GRID)  # one length
    assert np.isfinite(case.call(pipe)).all()
    assert kept["change"] > 0
    assert kinds(handle) == ["sparse"] * 3


def test_other_errors_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sizes are explained, and only where the length has just changed."""
    case = CASES["klein"]
    pipe = case.build()
    block = pipe.transformer.transformer_blocks[0]
    own, failing = block.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if failing == ["sizes"]:
            torch.add(torch.zeros(3), torch.zeros(4))
        if failing == ["dtypes"]:
            torch.dot(torch.zeros(2), torch.zeros(2, dtype=torch.int))
        return own(*args, **kwargs)

    block.forward = forward
    sra.patch(pipe, GRID)

    def fail(how: str) -> Callable[..., dict]:
        def callback(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
            failing.append(how)
            return kwargs

        return callback

    with pytest.raises(RuntimeError, match="must match") as caught:
        case.call(pipe, callback=fail("sizes"))
    assert not isinstance(caught.value, sra.SparseRefError)
    failing.clear()
    sra.patch(pipe, sra.SparseRef("mass", 0.25))
    with pytest.raises(RuntimeError, match="dtype") as caught:
        case.call(pipe, callback=fail("dtypes"))
    assert not isinstance(caught.value, sra.SparseRefError)


def test_memory_that_runs_out_is_not_explained() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    class Full(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise OutOfMemoryError("no room for a tensor of this size")

    with pytest.raises(OutOfMemoryError), ExplainedSizes("never"):
        torch.add(torch.ones(2).as_subclass(Full), 1)
