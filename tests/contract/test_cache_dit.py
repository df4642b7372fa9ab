"""cache-dit, which reuses the activations of earlier steps: where the kept count changes, a step computes in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cache_dit
import numpy as np
import pytest
import torch
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from tests.contract.state import kinds
from tests.pairwise import pairwise
from tests.pipelines import CASES, Case

FAMILIES = {name: CASES[name] for name in ("klein", "kontext", "qwen_edit_plus")}
cases = pytest.mark.parametrize("case", FAMILIES.values(), ids=list(FAMILIES))
PIECES = sra.SparseRef("grid", schedules.Linear(0.2, 0.8).piecewise(2))


class Cached:
    """Pipelines with cache-dit on, which changes their class: taken off at the end."""

    def __init__(self) -> None:
        self.pipes: list[Any] = []

    def on(self, pipe: Any, bare: bool = False, calibrator: Any = None, **settings: Any) -> list[int]:
        """Reuses every step after the first; returns a list that grows by a call of the last stack's last block."""
        common: dict[str, Any] = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 1}
        common |= {"residual_diff_threshold": 1e9, "enable_separate_cfg": False}
        target = pipe.transformer if bare else pipe
        cache_dit.enable_cache(target, cache_config=DBCacheConfig(**common | settings), calibrator_config=calibrator)
        self.pipes.append(target)
        calls: list[int] = []
        pipe.transformer.transformer_blocks[-1].attn.register_forward_pre_hook(lambda module, args: calls.append(1))
        return calls


@pytest.fixture
def cached() -> Iterator[Cached]:
    cached = Cached()
    yield cached
    for pipe in cached.pipes:
        cache_dit.disable_cache(pipe)


def kept(handle: sra.PatchHandle) -> list[int]:
    return [step.kept for step in handle.record.steps]


@pairwise(case=FAMILIES, cfg=[False, True], first=["patch", "cache"])
def test_a_count_that_changes_seldom(case: Case, cfg: bool, first: str, cached: Cached) -> None:
    """The run died where the count changes, by torch's words about sizes."""
    pipe, branches = case.build(layers=4), 1 + cfg
    if first == "cache":
        calls = cached.on(pipe, enable_separate_cfg=cfg)
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.25))
    if first == "patch":
        calls = cached.on(pipe, enable_separate_cfg=cfg)
    for _ in range(2):
        calls.clear()
        image = case.call(pipe, steps=5, cfg=cfg)
        assert kinds(handle) == ["profile", *["sparse"] * 4]
        assert len(calls) == 2 * branches  # the dense step, and the first of the new length
        assert np.isfinite(image).all()
    handle = sra.patch(pipe, PIECES)
    calls.clear()
    case.call(pipe, steps=6, cfg=cfg)
    assert kept(handle)[0] == kept(handle)[2] < kept(handle)[3] == kept(handle)[5]
    assert len(calls) == 2 * branches
    handle = sra.patch(pipe, sra.SparseRef("edges", 0.25))
    calls.clear()
    case.call(pipe, steps=6, cfg=cfg)
    assert len(calls) == branches


@cases
def test_steps_that_rank_again(case: Case, cached: Cached) -> None:
    """They measure, so they compute in full, and so does the step after."""
    pipe = case.build(layers=4)
    calls = cached.on(pipe)
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.25, rerank_every=3))
    case.call(pipe, steps=6)
    assert kinds(handle) == ["profile", "sparse", "sparse", "profile", "sparse", "sparse"]
    assert len(calls) == 4
    assert len(handle.record.stability) == 1
    assert not handle.notes


def test_a_measured_step_of_the_same_length_computes_in_full(cached: Cached) -> None:
    """The blocks that a cache passes over are not measured."""
    case = CASES["klein"]
    plain = case.build(layers=4)
    select = sra.AttentionMass(steps=(0, 1))
    wanted = sra.patch(plain, sra.SparseRef(select, 0.25))
    case.call(plain, steps=4)
    pipe = case.build(layers=4)
    cached.on(pipe)
    handle = sra.patch(pipe, sra.SparseRef(select, 0.25))
    case.call(pipe, steps=4)
    assert len(handle.record.attention) == len(wanted.record.attention)
    for got, right in zip(handle.record.scores or [], wanted.record.scores or [], strict=True):
        torch.testing.assert_close(got, right)


@cases
def test_a_cache_that_never_reuses_changes_nothing(case: Case, cached: Cached) -> None:
    plain = case.build(layers=4)
    sra.patch(plain, PIECES)
    wanted = case.call(plain, steps=4)
    pipe = case.build(layers=4)
    cached.on(pipe, residual_diff_threshold=0.0)
    sra.patch(pipe, PIECES)
    assert np.array_equal(case.call(pipe, steps=4), wanted)


@pytest.mark.parametrize("cfg", [False, True])
def test_its_forecasts_begin_anew(cfg: bool, cached: Cached) -> None:
    """The text stream has the same length before and after, and its slope would be that of the change."""
    case = CASES["klein"]
    pipe = case.build(layers=4)
    calls = cached.on(pipe, calibrator=TaylorSeerCalibratorConfig(taylorseer_order=1), enable_separate_cfg=cfg)
    sra.patch(pipe, PIECES)
    anchors: list[list[bool]] = []

    def note(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        context = pipe.transformer._context_manager.get_context(pipe.transformer._context_names[0])
        both = [*context.get_calibrators(), *context.get_cfg_calibrators()]
        states = [state for each in both if each is not None for state in each.states.values()]
        assert len(states) == 2 * (1 + cfg)  # image and text
        anchors.append([state.state["dY_prev"][0] is None for state in states])
        return kwargs

    assert np.isfinite(case.call(pipe, steps=8, cfg=cfg, callback=note)).all()
    assert len(calls) == 2 * (1 + cfg)
    assert all(anchors[4])


def test_a_mask_of_steps(cached: Cached) -> None:
    """Where it leaves cache-dit no choice, the run is refused at the step that would need one."""
    case = CASES["klein"]
    pipe = case.build(layers=4)
    mask = [1, 0, 0, 0, 0, 0]
    calls = cached.on(pipe, steps_computation_mask=mask, num_inference_steps=6)
    sra.patch(pipe, PIECES)
    case.call(pipe, steps=6)
    assert len(calls) == 2
    cache_dit.disable_cache(cached.pipes.pop())
    static = cached.on(pipe, steps_computation_mask=mask, num_inference_steps=6, steps_computation_policy="static")
    with pytest.raises(sra.IncompatibleError, match=r'must compute in full, got a "static" .* that reuses step 3'):
        case.call(pipe, steps=6)
    sra.patch(pipe, sra.SparseRef("grid", 0.5))
    static.clear()
    case.call(pipe, steps=6)
    assert len(static) == 1


def test_a_bare_transformer_and_what_runs_on_it_afterwards(cached: Cached) -> None:
    """Its contexts outlive a run: the next one, a call without references and the plain model find nothing stale."""
    case = CASES["klein"]
    pipe = case.build(layers=4)
    cached.on(pipe, bare=True, max_warmup_steps=0)
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.25))
    for _ in range(2):
        assert np.isfinite(case.call(pipe, steps=3)).all()
    assert np.isfinite(case.call(pipe, steps=3, references=0)).all()
    case.call(pipe, steps=3)
    handle.remove()
    assert np.isfinite(case.call(pipe, steps=3)).all()


def test_a_count_that_varies_is_refused(cached: Cached) -> None:
    case = CASES["kontext"]
    pipe = case.build(layers=4)
    cached.on(pipe)
    sra.patch(pipe, sra.SparseRef("grid", schedules.Linear(0.2, 0.8)))
    with pytest.raises(sra.IncompatibleError, match=r"changes at every step.*budget\.piecewise\(n\)"):
        case.call(pipe)
