"""One decision a step: what is kept when, under guidance and every budget: as recorded, and as the model sees it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from sparse_ref_attn.schedules import Budget
from sparse_ref_attn.schedules.clock import Clock
from tests.adapters.witnesses import GENERATION, witnessed
from tests.latents import CASES, each_case
from tests.pipelines import Case

STEPS = 5


def half_up(value: float) -> int:
    return max(1, math.floor(value + 0.5 + 1e-9))


@each_case(lambda case: case.cfg)
def test_both_branches_of_a_step_keep_the_same_tokens(case: Case) -> None:
    """The profiling step runs dense in both; afterwards both get the same rows at the same positions."""
    pipe = case.build()
    handle = sra.patch(pipe, sra.ReCAST(task="subject"))
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, references=max(case.references), cfg=True, steps=3)
    steps = handle.record.steps
    assert [step.calls for step in steps] == [2] * 3
    assert [step.kind for step in steps] == ["profile", "sparse", "sparse"]
    for step in steps:
        one, other = (call.reached for call in calls[2 * step.index : 2 * step.index + 2])
        assert torch.equal(one["hidden_states"], other["hidden_states"])
        assert one["hidden_states"].shape[1] == GENERATION + step.kept
        for name in ("img_ids", "img_shapes"):
            if name in one and isinstance(one[name], torch.Tensor):
                assert torch.equal(one[name], other[name])
            else:
                assert one.get(name) == other.get(name)
    assert all(call.reached["hidden_states"].shape[1] == call.rows for call in calls[:2])


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_counts_follow_eq_4(name: str, gamma: float) -> None:
    """N(t) = N_min + (N_max - N_min) (1 - t/T)^gamma, of each reference, on the clock i / (n - 1)."""
    case = CASES[name]
    pipe = case.build()
    handle = sra.patch(pipe, sra.ReCAST(256, 1024, gamma, task="subject"))
    case.call(pipe, references=max(case.references), steps=STEPS)
    sizes = handle.record.layout.sizes
    assert handle.record.steps[0].kept == sum(sizes)
    for step in handle.record.steps[1:]:
        progress = (step.index / (STEPS - 1)) ** gamma
        wanted = tuple(half_up(size / 16 + (size / 4 - size / 16) * progress) for size in sizes)
        assert step.selection is not None
        assert step.selection.counts() == wanted
        assert step.kept == sum(wanted)


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (schedules.Linear(0.25, 0.75), [24, 36, 48, 60, 72]),
        (schedules.Cosine(0.25, 0.75), [24, 31, 48, 65, 72]),
        (schedules.Descending(0.75, 0.25), [72, 51, 36, 27, 24]),
        (schedules.Linear(0.25, 0.75).piecewise(2), [36, 36, 60, 60, 60]),
        (schedules.Pieces((0.1, 1.0), (0.7,)), [10, 10, 10, 96, 96]),
        (schedules.Constant(17), [17] * 5),
        (schedules.Constant(1.0), [96] * 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_budget_at_run_time(budget: Budget, wanted: list[int]) -> None:
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef("grid", budget))
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, steps=STEPS)
    assert [step.kept for step in handle.record.steps] == wanted
    assert [call.reached["hidden_states"].shape[1] - GENERATION for call in calls] == wanted
    assert [step.kind for step in handle.record.steps] == ["dense" if kept == 96 else "sparse" for kept in wanted]


def test_every_budget_is_a_prefix_of_one_ranking() -> None:
    case = CASES["klein"]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef("mass", schedules.Linear(0.1, 0.6)))
    case.call(pipe, references=3, steps=STEPS)
    kept = [set(s.selection.indices.tolist()) for s in handle.record.steps if s.selection is not None]
    assert len(kept) == STEPS - 1
    for fewer, more in pairwise(kept):
        assert fewer < more


def test_clock_of_sigmas() -> None:
    """Progress is 1 - sigma_i / sigma_0, which a resolution shift makes slower than the step count."""
    case = CASES["klein"]
    pipe = case.build()
    counts = {}
    for clock in ("steps", "sigma"):
        handle = sra.patch(pipe, sra.SparseRef("grid", schedules.Linear(0.1, 0.9), clock=clock))
        case.call(pipe, steps=STEPS)
        counts[clock] = [step.kept for step in handle.record.steps]
    (size,) = handle.record.layout.sizes
    sigmas = pipe.scheduler.sigmas.tolist()
    assert counts["sigma"] == [half_up(size * (0.1 + 0.8 * (1 - s / sigmas[0]))) for s in sigmas[:STEPS]]
    assert counts["steps"] == [half_up(size * (0.1 + 0.2 * i)) for i in range(STEPS)]
    assert counts["sigma"] != counts["steps"]


def test_counts_of_a_run_that_starts_late() -> None:
    """Inpainting at strength 0.6 runs the last 3 of 5 steps: its own first step is the profiling step."""
    case = CASES["kontext_inpaint"]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef("mass", schedules.Linear(0.25, 0.75)))
    case.call(pipe, steps=STEPS, strength=0.6)
    assert handle.record.total_steps == 3
    (size,) = handle.record.layout.sizes
    assert [step.kept for step in handle.record.steps] == [size, size // 2, 3 * size // 4]


@dataclasses.dataclass(frozen=True)
class _CountedTopP(sra.TopP):
    """Notes every evaluation."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def counts(self, clock: Clock, sizes: Sequence[int], mass: Sequence[torch.Tensor] | None = None) -> tuple[int, ...]:
        assert mass is not None
        if not all(bool((part == 1).all()) for part in mass):  # not the check of sizes before the run
            self.seen.append(clock.index)
        return super().counts(clock, sizes, mass)


@pytest.mark.parametrize("select", ["mass", "grid"])
def test_top_p_is_evaluated_once_a_run(select: str) -> None:
    """It reads the mass on the host, and it never varies. A selector that measures nothing gets a profiling step."""
    case = CASES["klein"]
    pipe = case.build()
    budget = _CountedTopP(0.6, per="all")
    handle = sra.patch(pipe, sra.SparseRef(select, budget))
    for runs in (1, 2):
        case.call(pipe, references=2, cfg=True, steps=STEPS)
        assert budget.seen == [1] * runs
    record = handle.record
    assert record.mass is not None
    assert [step.kind for step in record.steps] == ["profile"] + ["sparse"] * (STEPS - 1)
    held = torch.cat(record.mass).double().sort(descending=True).values.cumsum(0)
    wanted = int((held < 0.6 * held[-1]).sum()) + 1
    assert {step.kept for step in record.steps[1:]} == {wanted}
    assert wanted < record.layout.reference_tokens
