"""Masks of attention under a training patch: one draw for the batch, or one for each item."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle

import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.types import RefSelection
from tests.adapters.attention_masks import BETWEEN, KEYS, MASKS, by_hand
from tests.contract.state import state
from tests.pipelines import CASES
from tests.training.batches import Batch, gradients, rows_of, tuned
from tests.training.test_patching import EACH, HALF, assert_close

MODELS = ("kontext", "klein", "flux2")
TEXT = 7


def in_turn(masks: Iterable[str]) -> pytest.MarkDecorator:
    """Each mask with one of the models, which say in the same way what theirs is."""
    return pytest.mark.parametrize(("mask", "name"), list(zip(masks, cycle(MODELS), strict=False)))


def masked(batch: Batch, mask: Tensor) -> Batch:
    batch.kwargs["joint_attention_kwargs"] = {"attention_mask": mask}
    return batch


def made(name: str, mask: str) -> tuple[Batch, Tensor]:
    batch = Batch(name, references=((6, 4), (9, 8)))
    whole = MASKS[mask](2, 2, TEXT, TEXT + batch.kwargs["hidden_states"].shape[1])
    return masked(batch, whole), whole


def gradients_by_hand(
    model: torch.nn.Module, batch: Batch, whole: Tensor, kept: tuple[RefSelection, ...]
) -> dict[str, Tensor]:
    """Of the batch with the rows of one selection, or of its items one by one, under the mask cut by hand."""
    model.zero_grad()
    for i, selection in enumerate(kept):
        rows = rows_of(batch, selection)
        items, mask = (slice(None), whole) if len(kept) == 1 else (slice(i, i + 1), whole)
        if len(kept) > 1 and mask.ndim in (2, 4) and mask.shape[0] == len(kept):
            mask = mask[items]
        given = dict(batch.kwargs)
        del batch.kwargs["joint_attention_kwargs"]
        alone = batch.only(rows, items)
        batch.kwargs = given
        joint = torch.cat([torch.arange(TEXT), TEXT + rows])
        (masked(alone, by_hand(mask, joint)).loss(model) / len(kept)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@in_turn(MASKS)
def test_one_draw_for_the_batch(mask: str, name: str) -> None:
    model, (batch, whole) = tuned(name), made(name, mask)
    dense = gradients(model, batch)
    handle = sra.patch_for_training(model, HALF)
    got = gradients(model, batch)
    kept = handle.kept
    handle.remove()
    assert_close(got, gradients_by_hand(model, batch, whole, kept))
    assert any(not torch.allclose(got[key], dense[key], rtol=1e-2) for key in got)


@pytest.mark.parametrize("checkpointing", [False, True])
@in_turn(KEYS)
def test_each_items_own_draw(mask: str, name: str, checkpointing: bool) -> None:
    model, (batch, whole) = tuned(name), made(name, mask)
    if checkpointing:
        model.enable_gradient_checkpointing()
    handle = sra.patch_for_training(model, EACH)
    got = gradients(model, batch)
    kept = handle.kept
    assert len({selection.kept for selection in kept}) > 1
    handle.remove()
    assert_close(got, gradients_by_hand(model, batch, whole, kept))


@in_turn(BETWEEN)
def test_items_with_their_own_draws_have_masks_of_keys(mask: str, name: str) -> None:
    """The kernel of ragged items has no other: refused in words, and nothing is drawn."""
    model, (batch, _) = tuned(name), made(name, mask)
    plain = Batch(name)
    handle = sra.patch_for_training(model, EACH)
    plain.predict(model)
    draws, wanted = handle.state_dict(), None
    with pytest.raises(sra.IncompatibleError, match=r"must be of keys, .* got .*\. Draw once for the batch"):
        batch.predict(model)
    assert handle.state_dict() == draws
    wanted = plain.predict(model)
    handle.load_state_dict(draws)
    assert torch.equal(plain.predict(model), wanted)


def test_a_mask_of_other_rows_is_refused_and_leaves_nothing() -> None:
    pipe = CASES["klein"].build()
    model, batch = pipe.transformer.train(), masked(Batch("klein"), torch.ones(2, 30).bool())
    plain = Batch("klein")
    for drop in (HALF, EACH):
        handle = sra.patch_for_training(model, drop)
        plain.predict(model)
        before, draws = state(pipe), handle.state_dict()
        with pytest.raises(sra.LayoutError, match="attention mask must be of the call's 70 joint rows"):
            batch.predict(model)
        assert (state(pipe), handle.state_dict()) == (before, draws)
        handle.remove()
