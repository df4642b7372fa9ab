"""A caller's mask where reference keys are stored: the model with these keys under the whole mask."""

from __future__ import annotations

import pytest
import torch

import sparse_ref_attn as sra
from tests.adapters.attention_masks import MASKS
from tests.adapters.test_dropping import ROUNDING, error, noise, scores
from tests.adapters.test_masks import in_turn, run
from tests.adapters.test_masks_plain import Masked, plain
from tests.adapters.test_mass import close
from tests.adapters.test_stored_references import with_keys_of
from tests.adapters.witnesses import GENERATION, KeysOf, best, witnessed
from tests.latents import CASES

SHARE = 0.3
STORED = sra.SparseRef(sra.FromFunction(noise), SHARE, execute=sra.Cache(refresh=sra.Never()))
masks = pytest.mark.parametrize("mask", MASKS, ids=str)


@pytest.mark.parametrize(("mask", "name"), in_turn(MASKS))
@torch.no_grad()
def test_columns_of_stored_keys_are_the_masks_own(name: str, mask: str) -> None:
    """In layers of both parities, whose stored rows lie before and after a call's own."""
    calls, handle = run(CASES[name], mask, STORED, steps=2)
    sizes, fresh = handle.record.layout.sizes, CASES[name].model()
    kept, cached = best(scores(sizes), sizes, SHARE), calls[1]
    wanted = with_keys_of(fresh, cached.given, calls[0], kept)[:, :GENERATION]
    unmasked = with_keys_of(fresh, cached.given | {"joint_attention_kwargs": None}, calls[0], kept)[:, :GENERATION]
    assert error(cached.sample[:, :GENERATION], wanted) < ROUNDING
    assert error(cached.sample[:, :GENERATION], unmasked) > 100 * ROUNDING


@torch.no_grad()
def test_a_padded_prompt_of_qwen_under_guidance() -> None:
    """Its own mask of the text knows nothing of stored keys."""
    case, pipe = CASES["qwen_edit_plus"], CASES["qwen_edit_plus"].build()
    handle = sra.patch(pipe, STORED)
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, steps=2, cfg=True, references=2)
    sizes, fresh = handle.record.layout.sizes, case.model()
    kept = best(scores(sizes), sizes, SHARE)
    masked = [call.given["encoder_hidden_states_mask"] is not None for call in calls]
    assert any(masked)
    for i in (2, 3):
        wanted = with_keys_of(fresh, calls[i].given, calls[i - 2], kept)[:, :GENERATION]
        assert error(calls[i].sample[:, :GENERATION], wanted) < ROUNDING


@masks
@pytest.mark.parametrize("select", ["noise", "mass"])
@torch.no_grad()
def test_a_dit_of_your_own(mask: str, select: str) -> None:
    """Another scale than the default, guidance in one batch; the references' keys of the first step."""
    torch.manual_seed(0)
    model, text = Masked().eval(), torch.randn(2, 12, 32)
    first, second = torch.randn(2, 112, 32), torch.randn(2, 112, 32)
    second[:, 64:] = first[:, 64:]
    given = {"text": text, "padding_mask": MASKS[mask](2, 2, 12, 124)}
    setting = STORED if select == "noise" else sra.SparseRef(sra.AttentionMass("all"), SHARE, execute=STORED.execute)
    handle = sra.patch(model, setting, adapter=plain(mask="padding_mask"))
    handle.begin(steps=2)
    with witnessed(model) as calls:
        model(x=first, **given)
    handle.step(1)
    got = model(x=second, **given)
    assert handle.record.scores is not None
    kept = best(torch.cat(handle.record.scores).numpy(), (48,), SHARE)
    assert handle.record.steps[1].kept == int(kept.sum())
    if select == "mass":
        mass = torch.stack([a.weights()[1, :, 12:76, 76:].mean((0, 1)) for a in calls[0].attention]).mean(0)
        close(handle.record.mass[0], mass)
    handle.remove()
    with KeysOf(calls[0].attention, 48, kept):
        wanted = model(x=second, **given)
    assert error(got[:, :64], wanted[:, :64]) < ROUNDING
    assert not got[:, 64:].any()


@masks
@torch.no_grad()
def test_measured_again_over_stored_keys_under_the_mask(mask: str) -> None:
    torch.manual_seed(0)
    model, text = Masked().eval(), torch.randn(2, 12, 32)
    first, second = torch.randn(2, 112, 32), torch.randn(2, 112, 32)
    second[:, 64:] = first[:, 64:]
    given = {"text": text, "padding_mask": MASKS[mask](2, 2, 12, 124)}
    way = sra.Cache(refresh=sra.Never(), rerank_every=1)
    handle = sra.patch(
        model, sra.SparseRef(sra.AttentionMass("all"), 1.0, execute=way), adapter=plain(mask="padding_mask")
    )
    handle.begin(steps=3)
    with witnessed(model) as calls:
        model(x=first, **given)
        handle.step(1)
        model(x=second, **given)
        handle.step(2)
        model(x=second, **given)
    measured = handle.record.mass[0]
    handle.remove()
    with KeysOf(calls[0].attention, 48), witnessed(model) as again:
        model(x=second, **given)
    mass = []
    for old, new in zip(calls[0].attention, again[0].attention, strict=True):
        new.k = torch.cat([new.k[:, :76], old.k[:, 76:]], 1)
        mass.append(new.weights()[1, :, 12:76, 76:].mean((0, 1)))
    close(measured, torch.stack(mass).mean(0))
