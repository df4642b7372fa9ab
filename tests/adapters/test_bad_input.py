"""Bad input: an error of the library's own that says what must hold and what was got, and a pipeline left whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from sparse_ref_attn.config import UniformGuard
from tests.latents import CASES

CASE = CASES["klein"]
SIZES = (96, 64)  # tokens of its first two references


def references_of(scores: Callable[[int], Any]) -> sra.FromFunction:
    return sra.FromFunction(lambda references: [scores(size) for size in references.sizes])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sra.SparseRef("grid", 0.0), r"keep must be .* \(float in \(0, 1\]\), got 0.0"),
        (lambda: sra.SparseRef("grid", 1.5), r"keep must be .* \(float in \(0, 1\]\), got 1.5"),
        (lambda: sra.SparseRef("grid", 0), r"keep must be .*, got 0"),
        (lambda: sra.SparseRef("grid", -3), r"keep must be .*, got -3"),
        (lambda: sra.SparseRef("grid", float("nan")), r"keep must be .*, got nan"),
        (lambda: sra.SparseRef("grid", True), r"keep must be .*, got True"),
        (lambda: sra.SparseRef("grid", "half"), r"a budget must be a Budget, .* got 'half'"),  # type: ignore[arg-type]
        (lambda: sra.SparseRef("gird"), r"a selector's name must be one of .*grid.*, got 'gird'; did you"),
        (lambda: sra.SparseRef(3), r"a selector must be a Selector or one of .*grid.*, got 3"),  # type: ignore[arg-type]
        (lambda: sra.SparseRef(floor=1.5), r"floor as a ratio must lie in \[0, 1\], got 1.5"),
        (lambda: sra.SparseRef(floor=-1), r"floor must be a ratio in \[0, 1\] or a number of tokens, got -1"),
        (lambda: sra.SparseRef(weights=(1, 0)), r"weights must be finite numbers above 0, .* got \(1, 0\)"),
        (lambda: sra.SparseRef(multiple=0), r"multiple must be an int of at least 1, got 0"),
        (lambda: sra.SparseRef(clock="time"), r"clock must be one of steps, sigma, got 'time'"),
        (lambda: sra.SparseRef(execute="rows"), "execute must be one of tokens, cache, both, got 'rows'"),
        (lambda: sra.SparseRef(seed=0.5), r"seed must be an int, got 0.5"),  # type: ignore[arg-type]
        (lambda: sra.ReCAST(task="recolour"), r"task must be one of auto, edit, subject, style, got 'recolour'"),
        (lambda: sra.ReCAST(2048, 1024), r"n_min <= n_max <= reference_tokens must hold, got 2048, 1024, 4096"),
        (lambda: sra.SparseContext(0.0), r"keep must be .*, got 0.0"),
        (lambda: UniformGuard(top_quarter=0.1), r"guard top_quarter must lie in \[0.25, 1\] .*, got 0.1"),
        (lambda: sra.AttentionMass(blocks=()), r"blocks must be one or more ints of at least 0, got \(\)"),
        (lambda: sra.AttentionMass(steps=(0, 0)), r"steps must not repeat, got \(0, 0\)"),
        (lambda: sra.SubjectMask(torch.zeros(8, 8)), r"a mask must mark at least one pixel, got all zeros"),
        (lambda: sra.Boxes([[]]), r"must have at least one box, or None for all of it, got an empty list"),
    ],
)  # fmt: skip
def test_refused_when_it_is_written(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(sra.ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (sra.SparseRef(sra.AttentionMass(blocks=(7,))), sra.ConfigError, r"within this model's 4 blocks, got \(7,\)"),
        ("grid", sra.ConfigError, r"name must be one of faithful, .*, sparse-context, got 'grid'"),
        ([0.5], sra.ConfigError, r"config must be a SparseRef \(.*\), a preset's name or a share, got list"),
        (1.5, sra.ConfigError, r"keep must be .* \(float in \(0, 1\]\), got 1.5"),
    ],
    ids=str,
)
def test_refused_when_the_pipeline_is_patched(config: Any, error: type[Exception], message: str) -> None:
    pipe = CASE.build()
    with pytest.raises(error, match=message):
        sra.patch(pipe, config)
    assert not pipe.transformer._forward_pre_hooks
    assert not pipe.transformer._forward_hooks
    assert "encode" not in vars(pipe.vae)


@pytest.mark.parametrize("what", [torch.nn.Linear(2, 2), object(), "black-forest-labs/FLUX.1-Kontext-dev", None])
def test_what_is_no_supported_model(what: Any) -> None:
    with pytest.raises(
        sra.UnsupportedModelError, match=r"must have an adapter, got torch.nn|must be a pipeline with a"
    ):
        sra.patch(what)


RUNS = {
    "more tokens than there are": (
        sra.SparseRef("grid", 65), sra.BudgetError, r"keep = 65, and reference 1 has 64 tokens"),
    "more tokens than all": (
        sra.SparseRef("grid", sra.Constant(161, per="all")), sra.BudgetError, r"all references together has 160"),
    "a later step's tokens": (
        sra.SparseRef("grid", schedules.Linear(4, 100)), sra.BudgetError, r"high = 100, and reference 0 has 96 tokens"),
    "too many for a profiled run": (
        sra.SparseRef("mass", 65), sra.BudgetError, r"keep = 65, and reference 1 has 64 tokens"),
    "top-p's floor": (
        sra.SparseRef("mass", sra.TopP(0.5, min_tokens=80)), sra.BudgetError, r"min_tokens = 80, and reference 1"),
    "a floor too big": (
        sra.SparseRef("grid", 0.5, floor=70), sra.BudgetError, r"not exceed reference 1's 64 tokens, got 70"),
    "weights": (
        sra.SparseRef("grid", 0.5, weights=(1, 2, 3)), sra.ConfigError, r"one a reference, got 3 for 2 references"),
    "profiling after the end": (
        sra.SparseRef(sra.AttentionMass(steps=(0, 9))), sra.ConfigError, r"within the run's 3 steps, got \[9\]"),
    "masks of another aspect": (
        sra.SparseRef(sra.SubjectMask([torch.ones(8, 8), torch.ones(8, 8)])), sra.ConfigError,
        r"mask 0 must have the aspect of its reference, 1.500 wide to high \(12 x 8 tokens\), got 1.000 \(8 x 8"),
    "masks of another number": (
        sra.SparseRef(sra.SubjectMask(torch.ones(8, 12))), sra.ConfigError, r"as many masks as references, 2, got 1"),
    "boxes of another number": (
        sra.SparseRef(sra.Boxes([None])), sra.ConfigError, r"as many lists of boxes as references, 2, got 1"),
    "scores of nothing": (
        sra.SparseRef(sra.FromFunction(lambda references: [])), sra.ConfigError,
        r"one score a token, \(96, 64\), got shapes \(\)"),
    "empty scores": (
        sra.SparseRef(references_of(lambda size: torch.zeros(0))), sra.ConfigError, r"got shapes \(\(0,\), \(0,\)\)"),
    "scores of another size": (
        sra.SparseRef(references_of(lambda size: torch.zeros(size, 1))), sra.ConfigError, r"got shapes \(\(96, 1\)"),
    "scores of another size in a mix": (
        sra.SparseRef(sra.Mix({references_of(lambda size: torch.zeros(size - 1)): 1.0})), sra.ConfigError,
        r"one score a token, \(96, 64\), got shapes \(\(95,\), \(63,\)\)"),
    "scores of another size in a union": (
        sra.SparseRef(sra.Union([sra.Grid(), references_of(lambda size: torch.zeros(1))])), sra.ConfigError,
        r"one score a token, \(96, 64\), got shapes \(\(1,\), \(1,\)\)"),
    "no scores at all": (
        sra.SparseRef(sra.FromFunction(lambda references: None)), sra.ConfigError,  # type: ignore[arg-type,return-value]
        r"must return a tensor or array of numbers for each reference, got None"),
    "words for scores": (
        sra.SparseRef(references_of(lambda size: ["best"] * size)), sra.ConfigError,
        r"must return a tensor or array of numbers for each reference, got \[\['best', 'best'"),
    "scores that are NaN": (
        sra.SparseRef(references_of(lambda size: torch.full((size,), torch.nan))), sra.NonFiniteError,
        r"scores of FromFunction must be finite, got NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_refused_at_the_first_step(name: str) -> None:
    """Before any step has run, dense profiling steps included; the same pipeline then runs, patched or not."""
    config, error, message = RUNS[name]
    pipe = CASE.build()
    finished: list[int] = []

    def note(pipe: Any, step: int, t: Any, values: dict) -> dict:
        finished.append(step)
        return values

    handle = sra.patch(pipe, config)
    with pytest.raises(error, match=message):
        CASE.call(pipe, references=2, callback=note)
    assert not finished
    with pytest.raises(sra.SparseRefError, match="must have taken place"):
        handle.summary()
    other = sra.patch(pipe, sra.SparseRef("grid", 0.5))
    CASE.call(pipe, references=2, steps=1)
    assert {step.kept for step in other.record.steps} == {80}
    other.remove()
    assert np.array_equal(CASE.call(pipe, references=2, steps=1), CASE.dense(references=2, steps=1))


@pytest.mark.parametrize("select", ["grid", "mass", "cosine"])
def test_nan_latents(select: str) -> None:
    """One NaN in a reference's latents is found before it can rank; the next, clean run is fine."""
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef(select, 0.5))
    latents = torch.randn(1, 4, 16, 24)
    latents[0, 1, 2, 3] = torch.nan
    with pytest.raises(sra.NonFiniteError, match="the references' latents must be finite, got NaN or infinity"):
        case.call(pipe, image=latents)
    case.call(pipe, image=latents.nan_to_num())
    assert handle.record.steps[-1].kept == 48


def test_nan_in_the_attention_is_found_at_ranking() -> None:
    case = CASES["kontext"]
    pipe = case.build()
    sra.patch(pipe, sra.SparseRef("mass", 0.5))
    weight = pipe.transformer.single_transformer_blocks[0].attn.norm_q.weight
    clean = weight.clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(sra.NonFiniteError, match="scores of AttentionMass must be finite, got NaN"):
        case.call(pipe)
    weight.data.copy_(clean)
    assert np.isfinite(case.call(pipe)).all()


def test_a_removed_handle() -> None:
    pipe = CASE.build()
    handle = sra.patch(pipe, sra.SparseRef("grid", 0.5))
    CASE.call(pipe)
    handle.remove()
    handle.remove()
    for use in (lambda: handle.begin(steps=3), lambda: handle.step(0)):
        with pytest.raises(sra.HandleRemovedError, match=r"must not be used after remove\(\); patch again"):
            use()
    assert "removed" in repr(handle)
    assert "48" in handle.summary()  # the report of its last run stays


@pytest.mark.parametrize(
    ("budget", "fits"),
    [
        (schedules.Linear(0.2, 0.8), False),
        (schedules.Polynomial(0.2, 0.8), False),
        (schedules.Linear(0.2, 0.8).piecewise(2), True),
        (sra.Constant(0.5), True),
    ],
    ids=["linear", "eq. 4", "piecewise", "constant"],
)
def test_a_varying_budget_under_a_step_cache(budget: schedules.Budget, fits: bool) -> None:
    """The cache compares activations of two steps, so they must have one length."""
    case = CASES["qwen_edit"]
    pipe = case.build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # every step it may is a cached one
    handle = sra.patch(pipe, sra.SparseRef("grid", budget))
    if fits:
        ran: list[int] = []
        pipe.transformer.transformer_blocks[1].attn.register_forward_hook(lambda *_: ran.append(1))
        case.call(pipe, steps=4, cfg=True)
        assert handle.record.steps[-1].kind == "sparse"
        stretches = len({step.kept for step in handle.record.steps})
        assert stretches == (1 if isinstance(budget, sra.Constant) else 2)
        assert len(ran) == 2 * stretches  # in both branches, at the first step of each stretch only
        return
    with pytest.raises(sra.IncompatibleError, match=r"a step cache needs a kept count that seldom .*piecewise\(n\)"):
        case.call(pipe, steps=4)
    pipe.transformer.disable_cache()
    case.call(pipe, steps=4)
    assert handle.record.steps[-1].kind == "sparse"


def test_a_layer_that_somebody_added_leaves_the_summary_without_flops() -> None:
    pipe = CASE.build()
    handle = sra.patch(pipe, sra.SparseRef("grid", 0.5))
    CASE.call(pipe)
    assert handle.flops() is not None
    pipe.transformer.image_prompt = torch.nn.Linear(4, 4)
    assert handle.flops() is None
    assert handle.summary("dict")["flops"] is None
    assert "48 (50 %)" in handle.summary()
