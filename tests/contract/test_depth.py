"""The contract where references leave by depth: the blocks are touched within a call only, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from tests.contract import patched
from tests.contract.state import kinds, state, steps
from tests.contract.test_offload import by_model, sequential
from tests.contract.test_weights import add, gradients
from tests.pairwise import pairwise
from tests.pipelines import CASES, Case

MODELS = {name: CASES[name] for name in ("kontext", "klein", "qwen_edit_plus_2511")}

GRID = sra.SparseRef("grid", 0.3, from_block=1)
MASS = sra.SparseRef("mass", schedules.Linear(0.2, 0.8), from_block=1)
IN_FLIGHT = sra.SparseRef("mass", schedules.Linear(0.2, 0.8), profile="in_flight", profile_blocks=1)
ALL = [sra.SparseRef("mass", 1.0, from_block=1), sra.SparseRef("mass", 1.0, profile="in_flight", profile_blocks=1)]
TURNS = {name: (i % 2,) for i, name in enumerate(CASES) if name != "klein_kv"} | {"longcat": (0, 1)}
"""Which of ALL, and of GRID and IN_FLIGHT; both where no other pipeline has the transformer."""
CONFIGS = {"grid": GRID, "mass": MASS, "in flight": IN_FLIGHT}
TOGETHER = dict(zip(MODELS, zip(MODELS.values(), CONFIGS.values(), strict=True), strict=True))
each_with_another = pytest.mark.parametrize(("case", "config"), TOGETHER.values(), ids=list(TOGETHER))


@pytest.mark.parametrize(("name", "turns"), TURNS.items(), ids=list(TURNS))
def test_every_token_kept_and_after_remove(name: str, turns: tuple[int, ...]) -> None:
    case, pipe = CASES[name], CASES[name].build()
    request: dict[str, Any] = {"steps": 2, "cfg": case.cfg, "references": min(2, max(case.references))}
    dense, before = case.call(pipe, **request), state(pipe)
    for turn in turns:
        handle = sra.patch(pipe, ALL[turn])
        on = state(pipe)
        assert np.array_equal(dense, case.call(pipe, **request))
        assert state(pipe) == on
        assert kinds(handle) == ["profile", "dense"]
        handle = sra.patch(pipe, (GRID, IN_FLIGHT)[turn])
        on = state(pipe)
        assert not np.array_equal(dense, case.call(pipe, **request))
        assert state(pipe) == on
    handle.remove()
    assert state(pipe) == before
    assert np.array_equal(dense, case.call(pipe, **request))


@each_with_another
def test_runs_repeat_and_two_pipelines_do_not_meet(case: Case, config: sra.SparseRef) -> None:
    pipe, other = case.build(), case.build(seed=1)
    handle = sra.patch(pipe, config)
    wanted, dense = case.call(pipe), case.call(other)
    ran = steps(handle)
    other_handle = sra.patch(other, GRID)
    case.call(other, first=5)
    case.call(pipe, first=7)
    assert np.array_equal(wanted, case.call(pipe))
    assert steps(handle) == ran
    other_handle.remove()
    assert np.array_equal(dense, case.call(other))
    copied = copy.deepcopy(pipe.transformer)
    handle.remove()
    pipe.transformer = copied
    assert np.array_equal(case.call(pipe), case.dense())


@pairwise(together=TOGETHER, error=[ZeroDivisionError, KeyboardInterrupt], late=[False, True])
def test_an_error_in_a_block(together: tuple[Case, sra.SparseRef], error: type[BaseException], late: bool) -> None:
    """Before the references have left, and after; torch runs no hook of ours after a KeyboardInterrupt."""
    case, config = together
    pipe = case.build()
    case.call(pipe, steps=1)
    before = state(pipe)
    handle = sra.patch(pipe, config)
    left: list[int] = []

    def fail(module: torch.nn.Module, args: tuple) -> None:
        left.append(1)
        if len(left) == 2:
            raise error

    with pipe.transformer.transformer_blocks[int(late)].register_forward_pre_hook(fail), pytest.raises(error):
        case.call(pipe)
    assert len(left) == 2
    assert np.array_equal(patched.picture(case, config), case.call(pipe))
    with pipe.transformer.transformer_blocks[int(late)].register_forward_pre_hook(fail):
        left.clear()
        with pytest.raises(error):
            case.call(pipe)
    handle.remove()
    assert state(pipe) == before
    assert np.array_equal(case.dense(), case.call(pipe))


@pairwise(together=TOGETHER, offload=[by_model, sequential], first=["patch", "offload"])
def test_offload(together: tuple[Case, sra.SparseRef], offload: Callable[[Any], None], first: str) -> None:
    case, config = together
    wanted = patched.picture(case, config)
    pipe = case.build()
    if first == "offload":
        offload(pipe)
    handle = sra.patch(pipe, config)
    if first == "patch":
        offload(pipe)
    for _ in range(2):
        assert np.array_equal(wanted, case.call(pipe))
    handle.remove()
    assert np.array_equal(case.dense(), case.call(pipe))


@pytest.mark.parametrize(
    ("case", "config"), list(zip(MODELS.values(), (MASS, IN_FLIGHT, MASS), strict=True)), ids=list(MODELS)
)
def test_lora(case: Case, config: sra.SparseRef) -> None:
    plain = case.build()
    add(plain)
    sra.patch(plain, config)
    wanted = case.call(plain)
    pipe = case.build()
    handle = sra.patch(pipe, config)
    bare = case.call(pipe)
    add(pipe)
    assert np.array_equal(wanted, case.call(pipe))
    assert not np.array_equal(wanted, bare)
    assert handle.flops().ratio > 1


@each_with_another
def test_gradient_checkpointing(case: Case, config: sra.SparseRef) -> None:
    """A block that runs again in the backward pass gets the rows of its own call, also when the patch is off."""
    wanted, handle = gradients(case, config, checkpointing=False, removed=False)
    at_input, _ = gradients(case, sra.SparseRef(config.select, config.budget), checkpointing=False, removed=False)
    assert any(not torch.equal(grad, at_input[name]) for name, grad in wanted.items())
    for removed in (False, True):
        got, again = gradients(case, config, checkpointing=True, removed=removed)
        assert steps(again) == steps(handle)
        for name, grad in wanted.items():
            assert torch.equal(grad, got[name]), name


@pytest.mark.parametrize("config", [GRID, replace(IN_FLIGHT, budget=0.3)], ids=["grid", "in flight"])
def test_a_step_cache_is_refused(config: sra.SparseRef) -> None:
    case = CASES["qwen_edit_plus"]
    pipe = case.build(layers=3)
    handle = sra.patch(pipe, config)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(sra.IncompatibleError, match="got a step cache"):
        case.call(pipe)
    pipe.transformer.disable_cache()
    case.call(pipe)
    assert kinds(handle) == ["sparse" if config is GRID else "in_flight", "sparse", "sparse"]


@pytest.mark.parametrize("case", [CASES["klein"], CASES["qwen_edit"]], ids=lambda case: case.name)
def test_batches_and_guidance(case: Case) -> None:
    """An item of a batch is what it is alone, in both branches."""
    pipe = case.build()
    handle = sra.patch(pipe, GRID)
    together = case.call(pipe, batch=2, cfg=True, images_per_prompt=2)
    assert {step.calls for step in handle.record.steps} == {2}
    assert np.isfinite(together).all()
    if case.name == "klein":
        alone = case.call(pipe, batch=1, cfg=True, images_per_prompt=2)
        np.testing.assert_allclose(together[:2], alone, atol=1e-5)
