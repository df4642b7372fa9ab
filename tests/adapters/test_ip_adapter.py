"""An IP-Adapter beside dropping: its attention to the image prompt is neither measured nor taken for the joint one."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import sparse_ref_attn as sra
from sparse_ref_attn.errors import BatchError, IncompatibleError, LayoutError
from tests.latents import CASES
from tests.pictures import generator, picture

CASE = CASES["kontext"]
IMAGE_ROWS = 64 + 96  # generation and reference of the case
JOINT_ROWS = IMAGE_ROWS + 32  # with the prompt


def build(tokens: tuple[int, ...] = (4,), scale: float = 1.0) -> Any:
    """As ``load_ip_adapter``: projections of the image prompt, and processors with keys and values of it."""
    pipe = CASE.build()
    model = pipe.transformer
    torch.manual_seed(3)
    model.set_attn_processor({
        name: FluxIPAdapterAttnProcessor(model.inner_dim, 32, tokens, [scale] * len(tokens))
        if name.startswith("transformer_blocks")
        else own
        for name, own in model.attn_processors.items()
    })  # fmt: skip
    layers = [ImageProjection(16, 32, count) for count in tokens]
    model.encoder_hid_proj = MultiIPAdapterImageProjection(layers).eval().requires_grad_(False)
    return pipe


def prompt(tokens: tuple[int, ...] = (4,), batch: int = 1) -> dict[str, Any]:
    return {
        "ip_adapter_image_embeds": [torch.randn(batch, 1, 16, generator=generator(i)) for i in range(len(tokens))],
        "negative_ip_adapter_image_embeds": [torch.zeros(batch, 1, 16) for _ in tokens],
    }


MEASURING = {
    "all blocks": sra.SparseRef(sra.AttentionMass(blocks="all"), 0.25),
    "double blocks": sra.SparseRef(sra.AttentionMass(blocks="double"), 0.25),
    "one block": sra.SparseRef(sra.AttentionMass(blocks=(0,)), 0.25),
    "single blocks": sra.SparseRef("mass", 0.25),
    "in flight": sra.ReCAST(task="subject", profile="in_flight"),
    "by reference queries": sra.SparseRef(sra.SelfAttention(blocks="all"), 0.25),
    "again at step 1": sra.SparseRef(sra.AttentionMass(blocks="all", steps=(0, 1)), 0.25),
}
# one or more adapters; as many keys as there are image rows, and as there are rows in all
TOKENS = [(4,), (4, 16), (IMAGE_ROWS,), (JOINT_ROWS,)]
EVERYWHERE = ("all blocks", "in flight", "by reference queries", "again at step 1")
"""The others measure a part of the blocks of the first: with the fewest and the most keys."""


@cache
def without(name: str) -> tuple[np.ndarray, Any, list, list]:
    """Picture, mass, steps and tokens of a run without an IP-Adapter."""
    plain = CASE.build()
    with sra.patched(plain, MEASURING[name]) as handle:
        want, steps = CASE.call(plain), handle.record.steps
        kept = [s.selection and s.selection.indices.tolist() for s in steps]
        return want, handle.record.mass, [(s.kind, s.kept) for s in steps], kept


@pytest.mark.parametrize(
    ("name", "tokens"), [(name, t) for name in MEASURING for t in (TOKENS if name in EVERYWHERE else TOKENS[::3])]
)
def test_what_is_measured_is_the_joint_attention(name: str, tokens: tuple[int, ...]) -> None:
    """At scale 0 the image prompt changes nothing: the same mass, tokens and picture as without it."""
    pipe, (want, mass, kinds, tokens_kept) = build(tokens, scale=0.0), without(name)
    with sra.patched(pipe, MEASURING[name]) as handle:
        got = CASE.call(pipe, **prompt(tokens))
        assert [(s.kind, s.kept) for s in handle.record.steps] == kinds
        assert [s.selection and s.selection.indices.tolist() for s in handle.record.steps] == tokens_kept
        for a, b in zip(mass or [], handle.record.mass or [], strict=True):
            assert torch.equal(a, b)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("select", ["grid", sra.AttentionMass(blocks="all")], ids=["grid", "mass"])
def test_all_kept_is_the_picture_without_a_patch(select: Any, cfg: bool) -> None:
    pipe, request = build(), {"cfg": cfg, "steps": 2}
    dense = CASE.call(pipe, **request, **prompt())
    assert not np.array_equal(dense, CASE.dense(**request))
    with sra.patched(pipe, sra.SparseRef(select, 1.0)):
        assert np.array_equal(CASE.call(pipe, **request, **prompt()), dense)
    with sra.patched(pipe, sra.SparseRef(select, 0.25)):
        assert not np.array_equal(CASE.call(pipe, **request, **prompt()), dense)
    assert np.array_equal(CASE.call(pipe, **request, **prompt()), dense)


@pytest.mark.parametrize("from_block", [1, 2, 3])
def test_references_leave_by_depth(from_block: int) -> None:
    pipe = build()
    with sra.patched(pipe, sra.SparseRef("grid", 0.25, from_block=from_block)) as handle:
        assert np.isfinite(CASE.call(pipe, steps=1, **prompt())).all()
        assert {step.kept for step in handle.record.steps} == {24}


def test_rows_of_the_image_prompts_attention_go_with_their_tokens() -> None:
    """Dropped tokens ask the image prompt nothing, kept ones what they asked before."""
    asked: list[tuple[int, int]] = []
    pipe = build()

    class Listen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is scaled_dot_product_attention:
                named = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
                asked.append((named["query"].shape[-2], named["key"].shape[-2]))
            return func(*args, **(kwargs or {}))

    with sra.patched(pipe, sra.SparseRef("grid", 0.25)), Listen():
        CASE.call(pipe, steps=1, **prompt())
    assert [pair for pair in asked if pair[1] == 4] == [(64 + 24, 4)] * 2


def test_calls_that_run_together_refuse_its_processors_in_words() -> None:
    pipe = build()
    words = r"must go through FluxAttnProcessor, got \['FluxIPAdapterAttnProcessor'\]"
    with pytest.raises((IncompatibleError, BatchError), match=words):
        sra.batch(
            pipe, ["a", "b"], [[picture(48, 32, 1)], [picture(48, 32, 2)]], config=sra.SparseRef("grid", 0.5),
            num_inference_steps=2, height=32, width=32, max_area=32 * 32, _auto_resize=False, **prompt(),
        )  # fmt: skip
    with pytest.raises(IncompatibleError, match=words):
        sra.patch_for_training(pipe.transformer, sra.RandomDrop(per_sample=True))


def test_a_block_that_never_attends_to_all_rows_is_an_error() -> None:
    """Passing calls by does not hide attention that was described wrongly."""

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x[:, None]
            return scaled_dot_product_attention(q, q[:, :, :5], q[:, :, :5])[:, 0]

    adapter = sra.PlainAdapter("x", lambda kwargs: ((0, 16), (sra.Reference(16, 9, (3, 3)),)), attention=["single"])
    with sra.patched(Odd(), sra.SparseRef("mass", 4), adapter=adapter) as handle:
        model = handle._transformer()
        handle.begin(1)
        with pytest.raises(LayoutError, match=r"block 0 must attend over all rows to be measured: .* and 5 keys"):
            model(torch.randn(1, 25, 8))
