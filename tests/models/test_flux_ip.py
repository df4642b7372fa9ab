"""Selecting among the tokens of an IP-Adapter's picture: ReCAST's few-token case, 64 of 128."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.errors import ConfigError, IncompatibleError, UnsupportedModelError
from tests.adapters.test_ip_adapter import CASE, build, prompt
from tests.adapters.witnesses import witnessed

TOKENS = 128


def text_to_image(tokens: int = TOKENS) -> Any:
    """FLUX.1 with an IP-Adapter and no picture in its sequence."""
    source = build((tokens,))
    return diffusers.FluxPipeline(**source.components)


def call(pipe: Any, steps: int = 3, pictures: int = 1, **more: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    given = {"ip_adapter_image_embeds": [torch.randn(1, pictures, 16, generator=torch.Generator().manual_seed(0))]}
    given |= {"negative_ip_adapter_image_embeds": [torch.zeros(1, pictures, 16)]}
    given |= {"height": 32, "width": 32, "num_inference_steps": steps, "max_sequence_length": 32, "output_type": "np"}
    return pipe(prompt="a cat", generator=torch.Generator().manual_seed(1), **given | more).images


def mass_by_hand(pipe: Any, layers: int = 2) -> Tensor:
    """Mean attention (tokens,) of the image rows to the image prompt, in float64, of a dense first step."""
    with witnessed(pipe.transformer) as calls:
        call(pipe, steps=1)
    found = [a for a in calls[0].attention if a.k.shape[1] == TOKENS and a.q.shape[1] == 64]
    assert len(found) == layers
    return torch.stack([attention.weights().mean((0, 1, 2)) for attention in found]).mean(0)


def test_all_tokens_are_the_picture_without_a_patch() -> None:
    pipe = text_to_image()
    dense = call(pipe)
    with sra.patched(pipe, sra.SparseRef("mass", 1.0), adapter=sra.IPAdapterTokens()) as handle:
        assert np.array_equal(call(pipe), dense)
        assert handle.record.layout.sizes == (TOKENS,)
    with sra.patched(pipe, sra.SparseRef("random", 64), adapter=sra.IPAdapterTokens()):
        assert not np.array_equal(call(pipe), dense)
    assert np.array_equal(call(pipe), dense)


@torch.no_grad()
def test_kept_tokens_are_those_with_the_most_attention_and_the_others_are_gone_bit_for_bit() -> None:
    pipe = text_to_image()
    mass = mass_by_hand(pipe)
    with sra.patched(pipe, sra.SparseRef(sra.AttentionMass(blocks="all"), 64), adapter=sra.IPAdapterTokens()) as handle:
        with witnessed(pipe.transformer) as calls:
            call(pipe)
        kept = handle.record.steps[-1].selection.indices
        torch.testing.assert_close(handle.record.mass[0].double(), mass, rtol=1e-4, atol=1e-7)
        assert [(s.kind, s.kept) for s in handle.record.steps] == [("profile", 128), ("sparse", 64), ("sparse", 64)]
        assert set(kept.tolist()) == set(mass.topk(64).indices.tolist())
        assert "64" in handle.summary()
        assert handle.flops() is None
        shares = [block.top_quarter for block in handle.record.attention]
        assert all(((share >= 0.25) & (share <= 1)).all() for share in shares)
        assert all(float((block.mass.mean() - 1).abs()) < 1e-4 for block in handle.record.attention)
    for sparse in calls[1:]:
        assert {a.k.shape[1] for a in sparse.attention if a.q.shape[1] == 64} == {64}
        embeds = sparse.given["joint_attention_kwargs"]["ip_adapter_image_embeds"]
        states = pipe.transformer.encoder_hid_proj(embeds)[0][:, 0, kept]
        wanted = pipe.transformer(**sparse.given | {"joint_attention_kwargs": {"ip_hidden_states": [states]}})[0]
        assert torch.equal(sparse.sample, wanted)


def test_each_picture_of_the_prompt_is_a_reference() -> None:
    pipe = text_to_image(4)
    with sra.patched(pipe, sra.SparseRef("mass", 0.5), adapter=sra.IPAdapterTokens()) as handle:
        call(pipe, pictures=3)
        assert handle.record.layout.sizes == (4, 4, 4)
        assert handle.record.steps[-1].selection.counts() == (2, 2, 2)


def test_guidance_and_a_picture_in_the_sequence() -> None:
    """A Kontext picture stays whole; both branches of guidance lose the same tokens."""
    pipe = build((16,))
    with sra.patched(pipe, sra.SparseRef("mass", 8), adapter=sra.IPAdapterTokens()) as handle:
        with witnessed(pipe.transformer) as calls:
            CASE.call(pipe, cfg=True, **prompt((16,)))
        assert [step.calls for step in handle.record.steps] == [2, 2, 2]
        assert handle.record.steps[-1].kept == 8
    assert [{a.k.shape[1] for a in c.attention if a.q.shape[1] == 160} for c in calls] == [{16}] * 2 + [{8}] * 4
    assert {c.reached["hidden_states"].shape[1] for c in calls} == {64 + 96}
    assert np.isfinite(CASE.call(pipe, **prompt((16,)))).all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (sra.SparseRef("mass", 0.5, sra.Cache()), "stores keys and values of the references"),
        (sra.SparseRef("random", 0.5, from_block=1), "must say what its blocks are"),
    ],
    ids=["stored", "by depth"],
)
def test_what_it_cannot_do_is_refused(config: sra.SparseRef, words: str) -> None:
    with pytest.raises((IncompatibleError, ConfigError), match=words):
        sra.patch(build(), config, adapter=sra.IPAdapterTokens())


def test_merging_is_refused() -> None:
    pipe = build()
    with (
        sra.patched(pipe, sra.SparseRef(sra.ToMe(), 0.5), adapter=sra.IPAdapterTokens()),
        pytest.raises(sra.SparseRefError, match="grid"),
    ):
        CASE.call(pipe, **prompt())


@pytest.mark.parametrize(("tokens", "count"), [((), 0), ((4, 4), 2)], ids=["none", "two"])
def test_there_must_be_one_adapter(tokens: tuple[int, ...], count: int) -> None:
    pipe = build(tokens) if tokens else CASE.build()
    with pytest.raises(UnsupportedModelError, match=f"must have one, by load_ip_adapter, got {count}"):
        sra.patch(pipe, sra.SparseRef("mass", 0.5), adapter=sra.IPAdapterTokens())
