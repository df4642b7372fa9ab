"""The learned selector: a head that is saved and loaded, shares among references of any size, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.model_words import model_words
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.selection import Learned, Mix, Union
from sparse_ref_attn.selection.head import Head, Origin
from sparse_ref_attn.selection.learned import SHIPPED
from sparse_ref_attn.toy.pipeline import build_transformer

from .scenes import references

MODEL = "FluxTransformer2DModel of 2 double and 4 single blocks"


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A head of random weights for tokens of eight channels."""
    torch.manual_seed(0)
    Head(8, Origin(MODEL, "ab12", {"pairs": 3}), channels=4).save(tmp_path / "head.safetensors")
    return str(tmp_path / "head.safetensors")


def test_what_is_saved_is_loaded(saved: str, tmp_path: Path) -> None:
    head = Learned.load(saved).head()
    assert head.origin == Origin(MODEL, "ab12", {"pairs": 3})
    assert not head.training
    head.save(tmp_path / "again.safetensors")
    again = Learned.load(tmp_path / "again.safetensors").head()
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in head.state_dict().items())
    refs = references([(3, 5)])
    assert torch.equal(Learned(saved).score(refs)[0], head.shares([refs.tokens], [(3, 5)]).exp()[0])


def test_a_file_that_changed_is_read_anew(saved: str) -> None:
    select, refs = Learned(saved), references([(3, 5)])
    before = select.score(refs)[0]
    Head(8, Origin("Other"), channels=2).save(saved)
    assert select.head().origin.model == "Other"
    assert not torch.equal(select.score(refs)[0], before)


def test_references_compete_and_each_item_counts_for_itself(saved: str) -> None:
    """Shares of tokens of all sizes sum to one; those of a batch are the mean of the items' own."""
    grids = [(3, 5), (1, 2), (7, 1)]
    refs = references(grids, batch=2)
    scores = Learned(saved).score(refs)
    assert [len(score) for score in scores] == [15, 2, 7]
    assert torch.cat(scores).sum() == pytest.approx(1, abs=1e-6)
    items = [Learned(saved).score(references(grids, tokens=item[None])) for item in refs.tokens]
    torch.testing.assert_close(torch.cat(scores), torch.stack([torch.cat(item) for item in items]).mean(0))
    alone = Learned(saved).score(references([(3, 5)], tokens=refs.tokens[:1, :15]))[0]
    kept = items[0][0]
    torch.testing.assert_close(alone, kept / kept.sum())  # beside others its tokens rank as without them


def test_the_prompt_is_told_of_each_item_that_is_scored(tmp_path: Path) -> None:
    """With guidance in one batch the conditional items alone count; another prompt ranks the same tokens otherwise."""
    torch.manual_seed(0)
    Head(8, Origin(MODEL), text=6, channels=4).save(tmp_path / "head.safetensors")
    select, prompt = Learned(str(tmp_path / "head.safetensors")), torch.randn(2, 6)
    one, other = (references([(3, 5)], prompt=x[None]) for x in prompt)
    assert not torch.equal(*(select.score(refs)[0].argsort() for refs in (one, other)))
    torch.testing.assert_close(select.score(references([(3, 5)], prompt=9 * prompt[:1] + 3))[0], select.score(one)[0])
    guided = references([(3, 5)], tokens=torch.cat([torch.zeros(1, 15, 8), one.tokens]), prompt=prompt[:1])
    guided.layout = replace(guided.layout, conditional=slice(1, 2))
    assert torch.equal(select.score(guided)[0], select.score(one)[0])
    for given, got in ((None, "none"), (torch.ones(1, 5), "5")):
        with pytest.raises(sra.LayoutError, match=f"a prompt of 6 channels, as it was trained on, got {got}"):
            select.score(references([(3, 5)], prompt=given))


def test_it_travels_as_its_path(saved: str) -> None:
    config = sra.SparseRef(Mix({Learned(saved): 2.0, Learned(): 1.0}), 0.25, "both")
    assert sra.SparseRef.from_json(json.dumps(config.to_dict())) == config
    assert sra.SparseRef("learned").select == Learned()


def test_the_shipped_head_is_small_and_of_the_small_model() -> None:
    assert SHIPPED.stat().st_size < 200_000
    transformer = build_transformer()
    assert Learned().head().origin.model == model_words(adapter_for(transformer), transformer) == MODEL


@pytest.mark.parametrize("wrapped", [lambda s: s, lambda s: Mix({s: 1}), lambda s: Union([sra.Grid(), s])])
def test_another_model_is_refused_when_it_is_patched(wrapped, tmp_path: Path) -> None:
    Head(64, Origin("QwenImageTransformer2DModel of 60 double blocks")).save(tmp_path / "head.safetensors")
    select = wrapped(Learned.load(tmp_path / "head.safetensors"))
    with pytest.raises(sra.ConfigError, match=r"trained for, Qwen.* of 60 double blocks, got Flux.* of 2 double and 4"):
        sra.patch(build_transformer(), sra.SparseRef(select, 0.25))


def test_tokens_of_another_width_and_without_a_grid_are_refused(saved: str) -> None:
    with pytest.raises(sra.LayoutError, match="as many channels as it was trained on, 8, got 6"):
        Learned(saved).score(references([(2, 2)], width=6))
    refs = references([(2, 2)])
    refs.layout = sra.TokenLayout(9, 7, (0, 5), (sra.Reference(5, 4),))
    with pytest.raises(sra.PixelsUnavailableError, match="full grid"):
        Learned(saved).score(refs)


def test_what_is_no_head_is_refused(saved: str, tmp_path: Path) -> None:
    with pytest.raises(sra.ConfigError, match="must be a file, got 'nowhere', which is none"):
        Learned.load("nowhere")
    with pytest.raises(sra.ConfigError, match="which is none"):
        sra.patch(build_transformer(), sra.SparseRef(Learned("nowhere"), 0.25))
    whole = Path(saved).read_bytes()
    other = tmp_path / "other.safetensors"
    for content in (b"", b"no head", whole[:-5], whole.replace(b"selector 1", b"selector 9")):
        other.write_bytes(content)
        with pytest.raises(sra.ConfigError, match="must be a file that sra train --selector writes"):
            Learned.load(other)
    for tensors, about in (
        ({"x": torch.zeros(1)}, {"width": 8, "text": 0, "channels": 4, "origin": {"model": "M"}}),
        ({}, {}),
    ):
        save_file(tensors, other, {"sparse_ref_attn": json.dumps({"format": "selector 1", **about})})
        with pytest.raises(sra.ConfigError, match="must be a file that sra train --selector writes"):
            Learned.load(other)
    with pytest.raises(sra.ConfigError, match="path must be that of a file"):
        Learned(3)  # type: ignore[arg-type]
