"""A caller's mask where each tile reads reference tokens of its own: keys alone, and hidden tokens are in no mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.errors import IncompatibleError, LayoutError
from tests.adapters.attention_masks import BETWEEN, KEYS, handed, rows_of, text_of
from tests.adapters.test_dropping import ROUNDING, error
from tests.adapters.test_masks import in_turn, run
from tests.adapters.test_masks_plain import Masked
from tests.adapters.test_tiles import by_hand, tiled, wanted
from tests.adapters.tiles_by_hand import ByTile, TilesOf
from tests.adapters.witnesses import GENERATION, witnessed
from tests.contract.state import state
from tests.latents import CASES

ONCE = tiled(refresh=sra.Never())
keys = pytest.mark.parametrize("mask", KEYS, ids=str)


@pytest.mark.parametrize(("mask", "name"), in_turn(KEYS))
@torch.no_grad()
def test_masks_of_keys(name: str, mask: str) -> None:
    calls, handle = run(CASES[name], mask, ONCE, steps=2)
    by, fresh = by_hand(handle.record, calls[1].text, 1), CASES[name].model()
    got = calls[1].sample[:, :GENERATION]
    assert error(got, wanted(fresh, calls[1], calls[0], by)) < ROUNDING
    unmasked = [a for a in calls[0].attention]
    for a in unmasked:
        a.mask = None
    calls[1].given["joint_attention_kwargs"] = None
    assert error(got, wanted(fresh, calls[1], calls[0], by)) > 100 * ROUNDING


def model_of_your_own(**settings: Any) -> sra.PlainAdapter:
    references = (sra.Reference(64, 48, (6, 8)),)
    return sra.PlainAdapter(
        "x", lambda kwargs: ((0, 64), references), text="text", attention=["single"] * 2,
        conditional=lambda kwargs: slice(1, 2), **settings,
    )  # fmt: skip


@keys
@torch.no_grad()
def test_a_dit_of_your_own_with_guidance_in_one_batch(mask: str) -> None:
    """More is asked for than one item's mask leaves; the run's scores are those of the conditional item."""
    torch.manual_seed(0)
    model, text, x = Masked().eval(), torch.randn(2, 12, 32), torch.randn(2, 112, 32)
    given = {"text": text, "padding_mask": KEYS[mask](2, 2, 12, 124)}
    handle = sra.patch(
        model,
        tiled(45, refresh=sra.Never()),
        adapter=model_of_your_own(mask="padding_mask", grid=lambda kwargs: (4, 16)),
    )
    handle.begin(steps=2)
    with witnessed(model) as calls:
        model(x=x, **given)
    handle.step(1)
    got = model(x=x, **given)
    mass = handle.record.mass[0]
    handle.remove()
    by = ByTile(12, (4, 16), [(6, 8)], (45,), 3, 3)
    pooled = torch.stack([by.mass(a)[1, 0] / 64 for a in calls[0].attention]).mean(0)
    torch.testing.assert_close(mass.double(), pooled, rtol=1e-4, atol=1e-7)
    with TilesOf(by, calls[0].attention):
        hand = model(x=x, **given)
    assert error(got[:, :64], hand[:, :64]) < ROUNDING


@pytest.mark.parametrize("mask", BETWEEN, ids=str)
def test_other_masks_are_refused_before_anything_runs(mask: str) -> None:
    case, pipe = CASES["klein"], CASES["klein"].build()
    given = handed(case, BETWEEN[mask](2, 2, text_of(case), rows_of("klein", 2)))
    dense = case.call(pipe, steps=2, batch=2)
    before = state(pipe)
    ran: list[Any] = []
    with sra.patched(pipe, ONCE):
        hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *args: ran.append(args))
        with pytest.raises(
            IncompatibleError, match=r"a mask must be of keys|an attention mask must be of keys, \(B, S\)"
        ):
            case.call(pipe, steps=2, batch=2, **given)
        hook.remove()
        assert not ran
    assert state(pipe) == before
    assert np.array_equal(case.call(pipe, steps=2, batch=2), dense)


@torch.no_grad()
def test_a_padded_prompt_of_qwen_under_guidance() -> None:
    case, pipe = CASES["qwen_edit_plus"], CASES["qwen_edit_plus"].build()
    handle = sra.patch(pipe, ONCE)
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, steps=2, cfg=True, references=2)
    assert any(call.given["encoder_hidden_states_mask"] is not None for call in calls)
    fresh = case.model()
    for i in (2, 3):
        by = by_hand(handle.record, calls[i].text, 1)
        assert error(calls[i].sample[:, :GENERATION], wanted(fresh, calls[i], calls[i - 2], by)) < ROUNDING


@torch.no_grad()
def test_a_mask_that_hides_other_references_than_when_they_were_stored() -> None:
    model, text, x = Masked().eval(), torch.randn(2, 12, 32), torch.randn(2, 112, 32)
    first, later = (torch.ones(2, 124).bool() for _ in range(2))
    later[:, 100] = False
    adapter = model_of_your_own(mask="padding_mask", grid=lambda kwargs: (8, 8))
    with sra.patched(model, ONCE, adapter=adapter) as handle:
        handle.begin(steps=2)
        model(x=x, text=text, padding_mask=first)
        handle.step(1)
        with pytest.raises(LayoutError, match="must hide the same of them as in the step that stored"):
            model(x=x, text=text, padding_mask=later)
        model(x=x, text=text, padding_mask=first)


class Hiding(Masked):
    """Masks a key that no argument names."""

    def forward(self, x: torch.Tensor, text: torch.Tensor, hidden: int | None = None) -> torch.Tensor:
        mask = torch.ones(len(x), x.shape[1] + text.shape[1]).bool()
        if hidden is not None:
            mask[:, hidden] = False
        return super().forward(x, text, mask)


@torch.no_grad()
def test_a_mask_of_the_models_own_is_told() -> None:
    model, text, x = Hiding().eval(), torch.randn(2, 12, 32), torch.randn(2, 112, 32)
    with sra.patched(model, ONCE, adapter=model_of_your_own(grid=lambda kwargs: (8, 8))) as handle:
        handle.begin(steps=2)
        with pytest.raises(
            LayoutError, match="every attention layer must mask the keys that the call's own mask names"
        ):
            model(x=x, text=text, hidden=3)
        model(x=x, text=text)
        handle.step(1)
        with pytest.raises(LayoutError, match="every attention layer must mask"):
            model(x=x, text=text, hidden=3)
        assert torch.isfinite(model(x=x, text=text)).all()
