"""Dropping rows at the input equals the dense model whose attentions do not see the dropped keys, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.selection import References
from tests.adapters.witnesses import GENERATION, Call, best, hidden_keys, witnessed
from tests.latents import CASES, each_case
from tests.pipelines import Case

KEEP = 0.3
ROUNDING = 2e-5  # of the output's scale: float32 sums in another order


def noise(references: References) -> list[Tensor]:
    """Scores without any pattern, from numpy."""
    return [torch.from_numpy(part) for part in np.split(scores(references.sizes), np.cumsum(references.sizes)[:-1])]


def scores(sizes: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(sizes)).permutation(sum(sizes)).astype(np.float32)


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def run(case: Case, budget: sra.Constant | sra.Linear | sra.Descending, **request: object) -> tuple[list[Call], tuple]:
    """Calls of a sparse run, and the tokens of each reference."""
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef(sra.FromFunction(noise), budget))
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, references=max(case.references), **request)
    sizes = handle.record.layout.sizes
    handle.remove()
    return calls, sizes


@each_case(lambda case: case.name != "klein_kv")
@torch.no_grad()
def test_equals_the_dense_model_with_the_dropped_keys_masked(case: Case) -> None:
    calls, sizes = run(case, sra.Constant(KEEP), cfg=case.cfg, batch=max(case.batch), steps=1)
    fresh = case.model()
    kept = best(scores(sizes), sizes, KEEP)
    # Klein inpainting gives each sample its own where there are as many further pictures as samples.
    assert len(sizes) == (2 if case.name == "klein_inpaint" else max(case.references))
    for call in calls:
        assert call.rows == GENERATION + len(kept)
        assert call.reached["hidden_states"].shape[1] == GENERATION + int(kept.sum())
        with hidden_keys(call, kept):
            wanted = fresh(**call.given)[0]
        rows = torch.cat([torch.ones(GENERATION).bool(), kept])
        assert call.sample.shape == wanted.shape
        assert error(call.sample[:, rows], wanted[:, rows]) < ROUNDING
        assert not call.sample[:, ~rows].any()
        dense = fresh(**call.given)[0][:, :GENERATION]
        assert error(call.sample[:, :GENERATION], dense) > 100 * ROUNDING  # the dropped tokens mattered


@each_case(lambda case: case.name != "klein_kv" and not case.name.startswith("qwen"))
@torch.no_grad()
def test_equals_the_model_called_on_the_kept_rows_bit_for_bit(case: Case) -> None:
    calls, sizes = run(case, sra.Constant(KEEP), steps=2)
    fresh = case.model()
    rows = np.flatnonzero(np.r_[np.ones(GENERATION, bool), best(scores(sizes), sizes, KEEP).numpy()])
    for call in calls:
        given = dict(call.given)
        given["hidden_states"] = given["hidden_states"][:, rows]
        given["img_ids"] = given["img_ids"][..., rows, :]
        assert torch.equal(call.sample[:, rows], fresh(**given)[0])


@pytest.mark.parametrize("budget", [sra.Constant(KEEP), sra.Linear(0.1, 0.5), sra.Descending(0.5, 0.1, 1.0)], ids=repr)
@pytest.mark.parametrize("references", [1, 3])
@torch.no_grad()
def test_klein_kv_extracts_the_largest_budget_and_reads_each_steps_own(
    budget: sra.Constant | sra.Linear | sra.Descending, references: int
) -> None:
    case = CASES["klein_kv"]
    pipe, fresh = case.build(), case.model()
    handle = sra.patch(pipe, sra.SparseRef(sra.FromFunction(noise), budget))
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, references=references, steps=3)
    sizes = handle.record.layout.sizes
    low, high = (budget.low, budget.high) if not isinstance(budget, sra.Constant) else (KEEP, KEEP)
    shares = [low + (high - low) * progress for progress in (0, 0.5, 1)]
    if isinstance(budget, sra.Descending):
        shares.reverse()
    stored = best(scores(sizes), sizes, high)
    extract, *later = calls
    with hidden_keys(extract, stored, references_first=True):
        wanted, cache = fresh(**extract.given)
    assert error(extract.sample, wanted) < ROUNDING
    layers = [cache.get_double(i) for i in range(2)] + [cache.get_single(i) for i in range(2)]
    joint = [attention for attention in extract.attention if attention.q.shape[1] == extract.text + GENERATION]
    for own, layer in zip(joint, layers, strict=True):
        stored_keys = own.k[:, extract.text : -GENERATION]
        assert stored_keys.shape[1] == int(stored.sum())
        assert error(stored_keys, layer.get()[0][:, stored]) < ROUNDING
    for call, share in zip(later, shares[1:], strict=True):
        assert call.rows == GENERATION
        kept = best(scores(sizes), sizes, share)
        assert {a.k.shape[1] for a in call.attention} == {call.text + GENERATION + int(kept.sum())}
        with hidden_keys(call, kept, references_first=True):
            wanted = fresh(**call.given | {"kv_cache": cache})[0]
        assert error(call.sample, wanted) < ROUNDING
    wanted_counts = [int(best(scores(sizes), sizes, share).sum()) for share in shares]
    assert [step.kept for step in handle.record.steps[1:]] == wanted_counts[1:]
    assert handle.record.steps[0].kept == int(stored.sum())


@each_case()
def test_text_rows_never_change(case: Case) -> None:
    """FLUX.2's padding too: colour and style reach the image through it."""
    calls, _ = run(case, sra.Constant(KEEP), steps=1)
    for call in calls:
        for name in ("encoder_hidden_states", "txt_ids", "encoder_hidden_states_mask"):
            if call.given.get(name) is not None:
                assert torch.equal(call.given[name], call.reached[name])
        joint = [a.k.shape[1] for a in call.attention if a.q.shape[1] >= call.text + GENERATION]
        assert len(joint) == (2 if case.name.startswith("qwen") else 4)
        assert min(joint) > call.text + GENERATION
