"""A sampling against the published interfaces alone; `test_comfyui_core` has the same on ComfyUI itself."""

from __future__ import annotations

import copy

import pytest
import torch

from integrations.comfyui.sampling import Sampling
from sparse_ref_attn.errors import ConfigError, IncompatibleError, PixelsUnavailableError
from tests.integrations.stand_in import Flux, sampled

GENERATION, TOKENS = 16, 12 + 8


@pytest.fixture
def model() -> Flux:
    torch.manual_seed(0)
    return Flux().eval()


@pytest.fixture
def references() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 4, *size, generator=generator) for size in ((8, 6), (4, 8))]


def test_all_tokens_are_the_model_as_it_is(model: Flux, references: list[torch.Tensor]) -> None:
    dense, rows = sampled(model, None, references)
    same, kept = sampled(model, Sampling("grid", 1.0), references)
    assert rows == kept == [GENERATION + TOKENS] * 4
    assert all(map(torch.equal, dense, same))


def test_each_step_runs_on_what_its_budget_keeps(model: Flux, references: list[torch.Tensor]) -> None:
    sampling = Sampling("ReCAST rising", 0.6)
    _, rows = sampled(model, sampling, references)
    assert rows == [GENERATION + step.kept for step in sampling.record.steps]
    assert [step.kind for step in sampling.record.steps] == ["profile", "sparse", "sparse", "sparse"]
    assert rows[1] < rows[2] < rows[3] < rows[0]
    assert sum(rows) / 4 - GENERATION == pytest.approx(0.6 * TOKENS, abs=1)


def test_the_prompts_items_rank(model: Flux, references: list[torch.Tensor]) -> None:
    alone, both = Sampling("ReCAST flat", 0.5), Sampling("ReCAST flat", 0.5)
    sampled(model, alone, references)
    sampled(model, both, references, marks=(1, 0))
    assert torch.allclose(torch.cat(alone.record.scores), torch.cat(both.record.scores), atol=1e-6)
    assert len(both.record.attention) == 2  # of the single blocks, once


def test_each_sampling_begins_anew_and_copies_share_the_patch(model: Flux, references: list[torch.Tensor]) -> None:
    sampling = Sampling("random", 0.5, seed=3)
    first, _ = sampled(model, sampling, references)
    record = sampling.record
    again, _ = sampled(model, copy.deepcopy(sampling), references)
    assert all(map(torch.equal, first, again))
    assert sampling.record is not record
    assert len(sampling.record.steps) == 4


def test_without_references_and_out_of_a_sampling_nothing_is_done(model: Flux) -> None:
    sampling = Sampling("grid", 0.5)
    dense, _ = sampled(model, None, [])
    same, _ = sampled(model, sampling, [])
    assert all(map(torch.equal, dense, same))
    assert sampling.record is None
    args = {"img": torch.zeros(1, 2, 3)}
    assert sampling.post_input(args) is args


def test_what_cannot_be_is_said(model: Flux, references: list[torch.Tensor]) -> None:
    with pytest.raises(PixelsUnavailableError, match="the rule 'edges' looks at pixels: connect the photo"):
        sampled(model, Sampling("edges", 0.5), references)
    with pytest.raises(ConfigError, match="more steps, a larger share"):
        sampled(model, Sampling("recast", 0.2), references, steps=4)
    deaf = Sampling("grid", 0.5)
    deaf.post_input = lambda args: args
    with pytest.raises(IncompatibleError, match="must call the patches named post_input"):
        sampled(model, deaf, references)
