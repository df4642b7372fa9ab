"""References in an argument of their own: the same run as that of the model that takes them behind the generation."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ref_attn as sra
from tests.adapters.test_plain import SIDE, TOKENS, build, example, given  # noqa: F401  (example is a fixture)

STEPS = 4


class Apart(nn.Module):
    """The example's model, to which references and their positions are given apart."""

    def __init__(self, joined: nn.Module) -> None:
        super().__init__()
        self.joined = joined

    def forward(
        self, tokens: Tensor, ids: Tensor, text: Tensor, timestep: Tensor, ref_latents: Tensor | None = None,
        ref_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As the model's own, with ref_latents (B, R, CHANNELS) and ref_ids (R, 3); the generation's rows come out."""
        rows = tokens.shape[1]
        if ref_latents is not None and ref_ids is not None:
            tokens, ids = torch.cat([tokens, ref_latents], 1), torch.cat([ids, ref_ids])
        out: Tensor = self.joined(tokens=tokens, ids=ids, text=text, timestep=timestep)[:, :rows]
        return out


def adapter(example: ModuleType, **more: Any) -> sra.PlainAdapter:  # noqa: F811
    def find(kwargs: dict[str, Any]) -> Any:
        if kwargs.get("ref_ids") is None:
            return (0, TOKENS), ()
        return sra.references_from_ids(torch.cat([kwargs["ids"], kwargs["ref_ids"]]))

    settings = {
        "tokens": "tokens", "references": "ref_latents", "reference_rows": {"ref_ids": 0}, "text": "text", "find": find,
        "attention": ["single"] * 2, "conditional": lambda kwargs: slice(0, 1), "positions": "ref_ids",
        "grid": lambda kwargs: (SIDE, SIDE), "name": "apart",
    }  # fmt: skip
    return sra.PlainAdapter(**settings | more)


def apart(call: dict[str, Tensor]) -> dict[str, Tensor]:
    """The call of the model that takes references apart."""
    tokens, ids = call["tokens"], call["ids"]
    own = {"ref_latents": tokens[:, TOKENS:], "ref_ids": ids[TOKENS:]}
    return {**call, "tokens": tokens[:, :TOKENS], "ids": ids[:TOKENS], **own}


def run(model: nn.Module, call: dict[str, Tensor], config: Any, own: sra.PlainAdapter) -> tuple[Tensor, Any]:
    outputs = []
    with sra.patched(model, config, adapter=own) as handle:
        handle.begin(steps=STEPS)
        for step in range(STEPS):
            handle.step(step)
            outputs.append(model(**call)[:, :TOKENS])
        return torch.stack(outputs), handle.record


CONFIGS = {
    "grid": sra.SparseRef("grid", 0.3),
    "mass": sra.SparseRef("mass", 0.3),
    "by reference queries": sra.SparseRef(sra.SelfAttention(blocks="all"), 0.3),
    "stored": sra.SparseRef("mass", 0.3, sra.Cache(refresh=sra.Every(2))),
    "both": sra.SparseRef("mass", 0.3, sra.Cache(refresh=sra.Every(2), rows="budget")),
    "per tile": sra.SparseRef("mass", 0.25, sra.Cache(refresh=sra.Every(2), per="tile")),
    "merged": sra.SparseRef(sra.ToMe(), 0.25),
    "downscaled": sra.SparseRef(sra.Downscale(source="latents"), 0.25),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_run_of_one_stream(example: ModuleType, name: str) -> None:  # noqa: F811
    model, images, text = build(example)
    call = given(example, images, text)
    joined = example.adapter(2)
    joined._grid = lambda kwargs: (SIDE, SIDE)
    want, record = run(model, call, CONFIGS[name], joined)
    other = Apart(model)
    got, own = run(other, apart(call), CONFIGS[name], adapter(example))
    assert torch.equal(got, want)
    assert [(s.kind, s.kept) for s in own.steps] == [(s.kind, s.kept) for s in record.steps]
    assert own.layout == record.layout
    assert not torch.equal(got[-1], other(**apart(call)))


def test_a_call_without_references_is_left_alone(example: ModuleType) -> None:  # noqa: F811
    model, images, text = build(example)
    call = {**apart(given(example, images, text)), "ref_latents": None, "ref_ids": None}
    plain = Apart(model)(**call)
    with sra.patched(Apart(model), sra.SparseRef("mass", 0.3), adapter=adapter(example)) as handle:
        assert torch.equal(handle._transformer()(**call), plain)


def test_dropping_every_reference_row_leaves_none(example: ModuleType) -> None:  # noqa: F811
    """As a cached call does: the model is given none, and its output is that of the generation alone."""
    model, images, text = build(example)
    call = apart(given(example, images, text))
    own = adapter(example)
    layout = own.layout(call, own.find(call))
    short = own.drop(call, layout, torch.arange(TOKENS))
    assert (short["ref_latents"], short["ref_ids"]) == (None, None)
    assert torch.equal(short["tokens"], call["tokens"])
    alone = {name: value for name, value in call.items() if "ref" not in name}
    assert torch.equal(Apart(model)(**short), Apart(model)(**alone))


REFERENCES = tuple(sra.Reference(at, TOKENS, (SIDE, SIDE)) for at in (0, TOKENS))


def alone(example: ModuleType, **more: Any) -> sra.PlainAdapter:  # noqa: F811
    """The references' argument as the stream, of a model whose generation has no rows that anybody could name."""
    return sra.PlainAdapter("ref_latents", lambda kwargs: ((0, 0), REFERENCES), {"ref_ids": 0}, **more)


@pytest.mark.parametrize("keep", [0.3, 0.5, 1.0])
def test_a_stream_of_references_alone(example: ModuleType, keep: float) -> None:  # noqa: F811
    """Also where as many rows are kept as the output has: half of them."""
    model, images, text = build(example)
    call = given(example, images, text)
    want, record = run(model, call, sra.SparseRef("grid", keep), example.adapter(2))
    half = {**apart(call), "tokens": call["tokens"][:, :TOKENS]}
    with sra.patched(Apart(model), sra.SparseRef("grid", keep), adapter=alone(example)) as handle:
        handle.begin(steps=STEPS)
        for step in range(STEPS):
            handle.step(step)
            assert torch.equal(handle._transformer()(**half), want[step])
        assert [s.kept for s in handle.record.steps] == [s.kept for s in record.steps]
        assert handle.flops() is None
        assert "apart" not in handle.summary()


def test_what_needs_the_generations_rows_says_so(example: ModuleType) -> None:  # noqa: F811
    model, images, text = build(example)
    call = apart(given(example, images, text))
    measured = alone(example, attention=["single"] * 2, text="text")
    for config, error, words in (
        (sra.SparseRef("mass", 0.3), sra.LayoutError, "attention is measured from the generation's rows"),
        (sra.SparseRef("grid", 0.3, "cache"), sra.IncompatibleError, "are read by the generation's rows"),
    ):
        with sra.patched(Apart(model), config, adapter=measured) as handle:
            handle.begin(steps=2)
            with pytest.raises(error, match=words):
                handle._transformer()(**call)


def test_what_is_named_wrongly_is_refused(example: ModuleType) -> None:  # noqa: F811
    model, images, text = build(example)
    call = apart(given(example, images, text))
    with pytest.raises(sra.ConfigError, match=r"name it \(references=\), got \['ref_ids'\]"):
        sra.PlainAdapter("tokens", example.find, reference_rows={"ref_ids": 0})
    with pytest.raises(sra.ConfigError, match=r"positions must be one of rows \['ids', 'ref_ids'\], got 'other'"):
        adapter(example, rows={"ids": 0}, positions="other")
    with pytest.raises(sra.UnsupportedModelError, match="must have the arguments latents; that of"):
        sra.patch(Apart(model), sra.SparseRef("grid", 0.3), adapter=adapter(example, references="latents"))
    for found in (((0, TOKENS - 1), ()), ((0, 0), (sra.Reference(0, 3),)), ((0, TOKENS), (sra.Reference(3, 9),))):
        own = adapter(example, find=lambda kwargs, found=found: found)
        with pytest.raises(sra.LayoutError, match=r"\(ref_latents\) lie behind the 64 rows of tokens"):
            own.layout(call, found)
    short = adapter(example, reference_rows={"ids": 0}, positions=None)
    found = short.find(call)
    with pytest.raises(sra.LayoutError, match="ids must have the 128 rows of the image stream"):
        short.drop(call, short.layout(call, found), torch.arange(TOKENS + 4))
