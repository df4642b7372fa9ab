"""A transformer without its pipeline: driven by `begin` and `step`, or observed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import sparse_ref_attn as sra
from tests.contract.state import ALL, GRID, MASS, kinds, steps
from tests.pipelines import CASES, Case

cases = pytest.mark.parametrize(
    "case", [CASES[name] for name in ("kontext", "klein", "klein_kv", "qwen_edit_plus")], ids=lambda case: case.name
)
KLEIN = CASES["klein"]
Recorded = list[tuple[tuple, dict[str, Any], torch.Tensor]]


def recorded(case: Case, config: sra.SparseRef | None, **request: Any) -> tuple[Any, Recorded, list[tuple[str, int]]]:
    """The transformer of a pipeline, unpatched; a run's calls, with their outputs under `config`; the run's steps."""
    pipe = case.build()
    given: list[tuple[tuple, dict[str, Any]]] = []
    outputs: list[torch.Tensor] = []
    hooks = [
        pipe.transformer.register_forward_pre_hook(lambda m, a, k: given.append((a, dict(k))), with_kwargs=True)
    ]  # before the patch's own, so that it sees what the pipeline gave
    handle = None if config is None else sra.patch(pipe, config)
    hooks.append(pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0].clone())))
    case.call(pipe, **request)
    for hook in hooks:
        hook.remove()
    ran = [] if handle is None else steps(handle)
    if handle is not None:
        handle.remove()
    return pipe.transformer, [(a, k, out) for (a, k), out in zip(given, outputs, strict=True)], ran


@torch.no_grad()
def replay(transformer: Any, calls: Recorded, handle: sra.PatchHandle | None = None, branches: int = 1) -> None:
    """Each call again, equal to what the pipeline's gave; `handle`, if any, is told the steps."""
    cache = None
    for i, (args, kwargs, wanted) in enumerate(calls):
        if handle is not None:
            handle.step(i // branches)
        if kwargs.get("kv_cache_mode") == "cached":
            kwargs = {**kwargs, "kv_cache": cache}
        output = transformer(*args, **kwargs)
        if kwargs.get("kv_cache_mode") == "extract":
            cache = output[1]
        assert torch.equal(output[0], wanted), i


@cases
def test_begin_and_step(case: Case) -> None:
    transformer, calls, ran = recorded(case, MASS)
    handle = sra.patch(transformer, MASS)
    for _ in range(2):
        handle.begin(steps=3)
        replay(transformer, calls, handle)
        assert steps(handle) == ran


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
def test_two_branches_a_step(name: str) -> None:
    transformer, calls, ran = recorded(CASES[name], MASS, cfg=True)
    assert len(calls) == 6
    handle = sra.patch(transformer, MASS)
    handle.begin(steps=3)
    replay(transformer, calls, handle, branches=2)
    assert steps(handle) == ran
    assert [step.calls for step in handle.record.steps] == [2, 2, 2]
    observed = sra.patch(transformer, sra.SparseRef("mass", 0.3))
    constant = recorded(CASES[name], sra.SparseRef("mass", 0.3), cfg=True)[1]
    replay(transformer, constant)
    assert kinds(observed) == ["profile", "sparse", "sparse"]
    assert [step.calls for step in observed.record.steps] == [2, 2, 2]


@pytest.mark.parametrize("first", [0, 5])
def test_a_lower_step_is_a_new_run(first: int) -> None:
    """Also where `begin` was forgotten: the last image's ranking is not used."""
    transformer, calls, _ = recorded(KLEIN, MASS)
    _, others, ran = recorded(KLEIN, MASS, first=first)
    handle = sra.patch(transformer, MASS)
    handle.begin(steps=3)
    replay(transformer, calls, handle)
    earlier = handle.record
    replay(transformer, others, handle)
    assert handle.record is not earlier
    assert steps(handle) == ran


def test_runs_of_a_single_step() -> None:
    """No step is lower than the last one then: the references tell."""
    config = sra.SparseRef(sra.Cosine(), 0.3)
    runs = [recorded(KLEIN, config, steps=1, first=first) for first in (0, 5, 9)]
    transformer = runs[0][0]
    handle = sra.patch(transformer, config)
    handle.begin(steps=1)
    for _, calls, ran in runs:
        replay(transformer, calls, handle)
        assert steps(handle) == ran


@cases
def test_observed(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """Without `begin` a lower timestep is the next step, a higher one a new run; said once."""
    config = sra.SparseRef("mass", 0.3)
    transformer, calls, ran = recorded(case, config)
    _, others, _ = recorded(case, config, first=5)
    handle = sra.patch(transformer, config)
    with caplog.at_level(logging.INFO, "sparse_ref_attn"):
        for run in (calls, others, calls, calls):
            replay(transformer, run)
            assert [s.kind for s in handle.record.steps] == [kind for kind, _ in ran]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "one device sync a call; call handle.begin(steps=...)" in caplog.text


def test_the_clock_of_an_observed_run() -> None:
    """Progress is 1 - t / t_0. It was that at the first step, and 1 at all others."""
    transformer, calls, _ = recorded(KLEIN, None, steps=6)
    times = [float(kwargs["timestep"][0]) for _, kwargs, _ in calls]
    handle = sra.patch(transformer, sra.SparseRef("grid", sra.Linear(0.25, 0.75)))
    for _, kwargs, _ in calls:
        transformer(**kwargs)
    assert [step.kept for step in handle.record.steps] == [round(96 * (0.25 + 0.5 * (1 - t / times[0]))) for t in times]
    assert len(set(times)) == 6


def test_observed_run_broken_off() -> None:
    """The next run begins at the same timestep with other references, or goes on below it."""
    config = sra.SparseRef("mass", 0.3)
    transformer, calls, _ = recorded(KLEIN, config)
    _, others, _ = recorded(KLEIN, config, first=5)
    handle = sra.patch(transformer, config)
    for broken in (1, 2):
        replay(transformer, calls[:broken])
        replay(transformer, others)
        assert kinds(handle) == ["profile", "sparse", "sparse"]
    dense = transformer(**{**calls[1][1], "hidden_states": others[1][1]["hidden_states"]})
    replay(transformer, others[:1])
    transformer(**calls[1][1])  # other references, a lower timestep: a run that starts late
    assert kinds(handle) == ["profile"]
    assert dense[0].shape == calls[1][2].shape


@cases
def test_positional_arguments(case: Case) -> None:
    transformer, calls, ran = recorded(case, GRID)
    handle = sra.patch(transformer, GRID)
    handle.begin(3)
    moved = []
    for args, kwargs, wanted in calls:
        assert not args
        kwargs = dict(kwargs)
        moved.append(((kwargs.pop("hidden_states"),), kwargs, wanted))
    replay(transformer, moved, handle)
    assert steps(handle) == ran


@torch.no_grad()
def test_wrapped_in_data_parallel() -> None:
    transformer, calls, ran = recorded(KLEIN, GRID)
    twice = torch.nn.DataParallel(torch.nn.DataParallel(transformer))
    handle = sra.patch(twice, GRID)
    handle.begin(3)
    replay(twice, calls, handle)
    assert steps(handle) == ran
    handle.remove()
    assert not torch.equal(twice(**calls[1][1])[0], calls[1][2])


def test_without_references_a_bare_transformer_needs_no_timestep(caplog: pytest.LogCaptureFixture) -> None:
    transformer, calls, _ = recorded(KLEIN, None, references=0)
    sra.patch(transformer, ALL)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        replay(transformer, calls)
    assert not caplog.records


def test_a_pipelines_own_run_ends_a_driven_one() -> None:
    """`begin` on a patched pipeline holds for its transformer in the user's loop, not for `pipe()` afterwards."""
    pipe = KLEIN.build()
    handle = sra.patch(pipe, MASS)
    image = KLEIN.call(pipe)
    ran = steps(handle)
    _, calls, _ = recorded(KLEIN, MASS, first=5)
    handle.begin(3)
    replay(pipe.transformer, calls, handle)
    assert (KLEIN.call(pipe) == image).all()
    assert steps(handle) == ran


@pytest.mark.parametrize("count", [0, -1, 2.0, True, None, 10**9])
def test_begin_and_step_with_bad_values(count: Any) -> None:
    handle = sra.patch(KLEIN.build().transformer, GRID)
    with pytest.raises(sra.ConfigError, match=rf"steps must be an int in 1\.\.100000, got {count}"):
        handle.begin(count)
    with pytest.raises(sra.IncompatibleError, match=r"handle\.begin\(steps=\.\.\.\) must be called before"):
        handle.step(0)
    handle.begin(4)
    for index in (-1, 4, 1.0, True):
        with pytest.raises(sra.ConfigError, match=r"step must be an int in \[0, 4\), got"):
            handle.step(index)


def test_a_removed_handle() -> None:
    pipe = KLEIN.build()
    handle = sra.patch(pipe, GRID)
    KLEIN.call(pipe)
    summary = handle.summary("dict")
    handle.remove()
    for use in (lambda: handle.begin(3), lambda: handle.step(0), lambda: handle.ranking):
        with pytest.raises(sra.HandleRemovedError, match=r"remove\(\)"):
            use()
    assert handle.summary("dict") == summary  # the last run can still be read
