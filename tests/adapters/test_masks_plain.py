"""Masks of attention of a DiT that is not from diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparse_ref_attn as sra
from tests.adapters.attention_masks import MASKS, by_hand
from tests.adapters.test_dropping import KEEP
from tests.adapters.test_mass import close
from tests.adapters.witnesses import best, witnessed


class Masked(nn.Module):
    """A DiT of somebody else's, with guidance in one batch and a mask of joint attention."""

    def __init__(self, heads: int = 2, channels: int = 16) -> None:
        super().__init__()
        self.heads, width = heads, heads * channels
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, padding_mask: Tensor | None = None, extra: Any = None) -> Tensor:
        joint = torch.cat([text, x], 1)
        mask = padding_mask if extra is None else extra["attention_mask"]
        if mask is not None and mask.shape == joint.shape[:2]:
            mask = mask[:, None, None]
        for layer in self.qkv:
            q, k, v = layer(joint).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            out = functional.scaled_dot_product_attention(2 * q, 2 * k, v, attn_mask=mask)
            joint = joint + out.transpose(1, 2).flatten(2)
        return joint[:, text.shape[1] :]


def plain(**settings: Any) -> sra.PlainAdapter:
    references = (sra.Reference(64, 48, (6, 8)),)
    return sra.PlainAdapter(
        "x", lambda kwargs: ((0, 64), references), text="text", attention=["single"] * 2,
        conditional=lambda kwargs: slice(1, 2), **settings,
    )  # fmt: skip


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("argument", ["padding_mask", "extra"])
@torch.no_grad()
def test_a_dit_of_your_own_with_guidance_in_one_batch(argument: str, mask: str) -> None:
    torch.manual_seed(0)
    model, x, text = Masked().eval(), torch.randn(2, 112, 32), torch.randn(2, 12, 32)
    whole = MASKS[mask](2, 2, 12, 124)
    given = {argument: whole if argument == "padding_mask" else {"attention_mask": whole}}
    handle = sra.patch(model, sra.SparseRef("mass", KEEP), adapter=plain(mask=argument))
    handle.begin(steps=2)
    with witnessed(model) as calls:
        model(x=x, text=text, **given)
    handle.step(1)
    got = model(x=x, text=text, **given)
    assert handle.record.mass is not None
    close(
        handle.record.mass[0],
        torch.stack([a.weights()[1, :, 12:76, 76:].mean((0, 1)) for a in calls[0].attention]).mean(0),
    )
    assert handle.record.scores is not None
    kept = best(torch.cat(handle.record.scores).numpy(), (48,), KEEP)
    rows = torch.cat([torch.ones(76).bool(), kept]).nonzero().flatten()
    handle.remove()
    short = by_hand(whole, rows)
    short = short if argument == "padding_mask" else {"attention_mask": short}
    assert torch.equal(got[:, rows[12:] - 12], model(x=x[:, rows[12:] - 12], text=text, **{argument: short}))


@pytest.mark.parametrize("length", [112, 124])
def test_a_mask_that_nobody_named(length: int) -> None:
    """It would keep its length while the tokens lose theirs."""
    model, x, text = Masked(), torch.randn(2, 112, 32), torch.randn(2, 12, 32)
    with sra.patched(model, sra.SparseRef("grid", KEEP), adapter=plain()) as handle:
        handle.begin(steps=1)
        with pytest.raises(sra.LayoutError, match=r"must be named to the plain adapter \(mask='padding_mask'\)"):
            model(x=x, text=text, padding_mask=torch.ones(2, length).bool())
        with pytest.raises(sra.LayoutError, match="must be named"):
            model(x=x, text=text, extra={"attention_mask": torch.ones(2, length).bool()})
