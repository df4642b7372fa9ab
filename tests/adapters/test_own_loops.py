"""Loops that integrate by themselves: the steps that the report tells are the steps that ran."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from tests.latents import CASES

CASE = CASES["kontext"]
GENERATION = 64


def stored(pipe: Any) -> dict[str, Any]:
    """The arguments of a pipeline's transformer call."""
    seen: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, kwargs: seen.update(kwargs), with_kwargs=True)
    CASE.call(pipe, steps=1)
    hook.remove()
    return seen


def loop(pipe: Any, call: dict[str, Any], times: list[float], branches: int = 1) -> list[int]:
    """Runs `times` without ``scheduler.step``; the reference rows of each call, as the first block gets them."""
    x, rows = call["hidden_states"].clone(), []
    other = call["encoder_hidden_states"].clone()
    block = pipe.transformer.transformer_blocks[0]
    hook = block.register_forward_pre_hook(
        lambda m, a, kwargs: rows.append(kwargs["hidden_states"].shape[1] - GENERATION), with_kwargs=True
    )
    for t in times:
        for text in (call["encoder_hidden_states"], other)[:branches]:
            named = {"hidden_states": x, "timestep": torch.tensor([t]), "encoder_hidden_states": text}
            with torch.no_grad():
                v = pipe.transformer(**{**call, **named})[0][:, :GENERATION]
        x = torch.cat([x[:, :GENERATION] - 0.1 * v, x[:, GENERATION:]], 1)
    hook.remove()
    return rows


def begun(pipe: Any, steps: int = 5) -> list[float]:
    """Sets the pipeline's scheduler, which then stands still; its timesteps."""
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 0.2, steps), mu=0.5)
    return (pipe.scheduler.timesteps / 1000).tolist()


@pytest.mark.parametrize("branches", [1, 2])
def test_a_scheduler_that_stands_still(branches: int) -> None:
    """The first step is counted, and is the only dense one; every later call was taken for a new run's first."""
    pipe = CASE.build()
    call = stored(pipe)
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.25))
    rows = loop(pipe, call, begun(pipe), branches)
    assert rows == [96] * branches + [24] * (4 * branches)
    assert [step.kept for step in handle.record.steps] == [96, 24, 24, 24, 24]
    assert [step.calls for step in handle.record.steps] == [branches] * 5
    assert [step.kind for step in handle.record.steps] == ["profile"] + ["sparse"] * 4
    handle.remove()


@pytest.mark.parametrize("scheduled", [True, False], ids=["pipeline", "bare transformer"])
def test_timesteps_that_rise(scheduled: bool) -> None:
    """An inversion: every step is dense, told as it ran, with a note; the denoising after it is a run of its own."""
    pipe = CASE.build()
    call = stored(pipe)
    times = begun(pipe) if scheduled else [1.0, 0.8, 0.6, 0.4, 0.2]
    handle = sra.patch(pipe if scheduled else pipe.transformer, sra.SparseRef("mass", 0.25))
    assert loop(pipe, call, times[::-1]) == [96] * 5
    assert [step.kept for step in handle.record.steps] == [96] * 5
    assert any("the timesteps rise" in note for note in handle.notes)
    assert "the timesteps rise" in handle.summary()
    again = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}
    rows = loop(pipe, again, [t - 0.01 for t in times])
    assert rows[1:] == [24] * 4
    assert [step.kept for step in handle.record.steps] == rows
    assert not any("the timesteps rise" in note for note in handle.notes)
    handle.remove()


def test_the_same_loop_twice_is_two_runs() -> None:
    """With the same text and references: the second one ranks anew, and the report is its own."""
    pipe = CASE.build()
    call = stored(pipe)
    handle = sra.patch(pipe.transformer, sra.SparseRef("mass", 0.25))
    times = [1.0, 0.6, 0.2]
    assert loop(pipe, call, times) == loop(pipe, call, times) == [96, 24, 24]
    assert [step.kept for step in handle.record.steps] == [96, 24, 24]
    handle.remove()
