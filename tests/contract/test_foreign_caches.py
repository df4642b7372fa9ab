"""Step caches of others beside a patch: cache-dit, and forwards that keep a step's activations for the next."""

from __future__ import annotations

from typing import Any

import cache_dit
import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from tests.pipelines import CASES

CONSTANT = sra.SparseRef("edges", 0.25)
SELDOM = {
    "dense first step": (sra.SparseRef("mass", 0.25), [96, 24, 24, 24, 24, 24]),
    "ranked again": (sra.SparseRef("mass", 0.25, rerank_every=3), [96, 24, 24, 96, 24, 24]),
    "pieces": (sra.SparseRef("grid", sra.Linear(0.2, 0.8).piecewise(2)), [34, 34, 34, 62, 62, 62]),
}


def cached(pipe: Any) -> Any:
    """cache-dit on every step that it may skip."""
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1e9, max_warmup_steps=1
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    return pipe


@pytest.mark.parametrize("first", ["cache", "patch"])
@pytest.mark.parametrize("name", ["klein", "kontext", "qwen_edit_plus"])
@pytest.mark.parametrize("setting", list(SELDOM))
def test_cache_dit_beside_a_count_that_changes_seldom(setting: str, name: str, first: str) -> None:
    """Its residuals of another length go where the count changes; torch's size mismatch came out of it."""
    case, (config, kept) = CASES[name], SELDOM[setting]
    pipe = case.build(layers=4)
    if first == "cache":
        handle = sra.patch(cached(pipe), config)
    else:
        handle = sra.patch(pipe, config)
        cached(pipe)
    ran: list[int] = []
    block = pipe.transformer.transformer_blocks[-1]
    block.register_forward_pre_hook(lambda *_: ran.append(1))
    images = [case.call(pipe, steps=6) for _ in range(2)]
    assert [step.kept for step in handle.record.steps] == kept
    assert np.array_equal(*images)  # nothing of the first run is left in the second
    assert np.isfinite(images[0]).all()
    if (name, setting) != ("qwen_edit_plus", "ranked again"):  # there every second call counts as the other branch's
        assert len(ran) < 12  # the cache does skip steps


def test_cache_dit_under_guidance() -> None:
    case = CASES["klein"]
    pipe = cached(case.build(layers=4))
    handle = sra.patch(pipe, SELDOM["dense first step"][0])
    case.call(pipe, steps=6, cfg=True)
    assert [(step.kept, step.calls) for step in handle.record.steps] == [(96, 2)] + [(24, 2)] * 5


def test_cache_dit_and_a_count_that_changes_at_every_step_is_refused() -> None:
    pipe = cached(CASES["klein"].build(layers=4))
    sra.patch(pipe, sra.SparseRef("grid", sra.Linear(0.1, 0.9)))
    with pytest.raises(sra.IncompatibleError, match=r"Use budget\.piecewise\(n\)"):
        CASES["klein"].call(pipe, steps=6)


def in_a_closure(model: Any) -> None:
    block, state = model.transformer_blocks[0], {}  # type: ignore[var-annotated]
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = kwargs.get("hidden_states", args[0] if args else None)
        if "last" in state:
            state["change"] = float((x - state["last"]).abs().mean())
        state["last"] = x
        return own(*args, **kwargs)

    block.forward = forward


def on_the_model(model: Any) -> None:
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = kwargs["hidden_states"]
        if getattr(model, "previous_input", None) is not None:
            model.change = float((x - model.previous_input).abs().mean())
        model.previous_input = x
        return own(*args, **kwargs)

    model.forward = forward


@pytest.mark.parametrize("keeps", [in_a_closure, on_the_model])
@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit"])
def test_a_forward_that_keeps_activations_is_noticed(name: str, keeps: Any) -> None:
    """TeaCache's way: own words where the count is about to change, and a constant count runs."""
    case = CASES[name]
    pipe = case.build()
    keeps(pipe.transformer)
    with sra.patched(pipe, CONSTANT) as handle:
        case.call(pipe)
        assert len({step.kept for step in handle.record.steps}) == 1
    words = pytest.raises(sra.IncompatibleError, match=r"from 96 to 24, and .* holds some .*TeaCache")
    with sra.patched(case_of(pipe), sra.SparseRef("mass", 0.25)), words:
        case.call(pipe)


def case_of(pipe: Any) -> Any:
    """The pipeline, with what its forward kept of another length forgotten."""
    block = pipe.transformer.transformer_blocks[0]
    for cell in getattr(vars(block).get("forward"), "__closure__", None) or ():
        if isinstance(cell.cell_contents, dict):
            cell.cell_contents.clear()
    pipe.transformer.previous_input = None
    return pipe


def test_a_forward_that_keeps_nothing_is_no_obstacle() -> None:
    case = CASES["kontext"]
    pipe = case.build()
    want = case.call(pipe)
    with sra.patched(pipe, sra.SparseRef("mass", 0.25)):
        sparse = case.call(pipe)
    block, seen = pipe.transformer.transformer_blocks[0], []  # type: ignore[var-annotated]
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["hidden_states"].shape)
        return own(*args, **kwargs)

    block.forward = forward
    with sra.patched(pipe, sra.SparseRef("mass", 0.25)):
        assert np.array_equal(case.call(pipe), sparse)
    assert np.array_equal(case.call(pipe), want)
    assert len(seen) == 6


@pytest.mark.parametrize("budget", [sra.Linear(0.1, 0.9), sra.Linear(0.1, 0.9).piecewise(3)], ids=["varies", "pieces"])
def test_blocks_compiled_for_one_length_each(budget: Any) -> None:
    """dynamic=False and a length at every step die at torch's recompile limit: refused before the first block."""
    case = CASES["klein"]
    pipe = case.build()
    torch._dynamo.reset()
    sra.patch(pipe, sra.SparseRef("grid", budget))
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
    if isinstance(budget, sra.Linear):
        with pytest.raises(
            sra.IncompatibleError, match=r"at most 8 sequence lengths .* got 14 .*piecewise.*dynamic=None"
        ):
            case.call(pipe, steps=14)
        case.call(pipe, steps=4)
    else:
        case.call(pipe, steps=14)
