"""Reference K/V of one run used in another: the same image without computing them, and nothing else is let in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.errors import BudgetError, ConfigError, IncompatibleError, LayoutError, SparseRefError
from tests.adapters.test_cache import CASE, PIXELS, config
from tests.adapters.witnesses import GENERATION, witnessed
from tests.pictures import generator
from tests.pipelines import CASES


def captured(pipe: Any, setting: sra.SparseRef, **request: Any) -> sra.ReferenceCache:
    with sra.patched(pipe, setting) as handle:
        handle.capture()
        CASE.call(pipe, **request)
        return handle.reference_cache


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_another_prompt_seed_and_batch_give_the_same_image_as_computing_them_anew(share: float, tmp_path: Path) -> None:
    pipe = CASE.build()
    captured(pipe, config(share), references=3, batch=2).save(tmp_path / "cup.safetensors")
    other = {"references": 3, "prompt": ["another", "prompt"], "seed": 5, "images_per_prompt": 2, "batch": 2}
    with sra.patched(pipe, config(share)):
        anew = CASE.call(pipe, **other)
    with sra.patched(pipe, config(share)) as handle, witnessed(pipe.transformer) as calls:
        handle.reuse(sra.ReferenceCache.load(tmp_path / "cup.safetensors"))
        again = CASE.call(pipe, **other)
        kept = [step.kept for step in handle.record.steps]
        assert [step.kind for step in handle.record.steps] == ["cached"] * 3
        assert handle.notes == ["the references' keys and values are those of an earlier run, 256 of 256 tokens"]
        assert [a.k.shape[1] - calls[0].text - GENERATION for a in calls[0].attention] == [kept[0]] * 4
        assert calls[0].rows == GENERATION + 256  # what the pipeline gave; no reference row reaches the model
        assert calls[0].reached["hidden_states"].shape[1] == GENERATION
        handle.reuse(None)
        assert np.array_equal(CASE.call(pipe, **other), anew)
    if share == 1:
        np.testing.assert_allclose(again, anew, atol=PIXELS)
    else:  # the first step keeps what the budget says, where computing anew keeps all: other images, the same rows
        assert np.abs(again - anew).max() > PIXELS
        with sra.patched(pipe, config(share, "both")):
            both = CASE.call(pipe, **other)
        assert np.abs(both - again).max() > 0  # references that see each other less have other keys


def test_what_was_saved_is_what_the_model_stores(tmp_path: Path) -> None:
    pipe = CASE.build().to(torch.bfloat16)
    kept = captured(pipe, config(0.3), references=2)
    kept.save(tmp_path / "cache")
    loaded = sra.ReferenceCache.load(tmp_path / "cache")
    with witnessed(pipe.transformer) as calls, torch.no_grad():
        CASE.call(pipe, references=2)
        _, cache = pipe.transformer(**calls[0].given)
    layers = [*cache.double_block_caches, *cache.single_block_caches]
    for layer, mine, read in zip(layers, kept.layers, loaded.layers, strict=True):
        for stored, own, file in zip(layer.get(), mine, read, strict=True):
            assert torch.equal(stored, own)
            assert torch.equal(own, file)
            assert file.dtype == torch.bfloat16
    assert loaded.source == kept.source
    assert loaded.complete
    assert loaded.nbytes == kept.nbytes == 4 * 2 * 160 * 2 * 16 * 2


def test_a_part_of_the_rows_brings_its_ranking(tmp_path: Path) -> None:
    pipe = CASE.build()
    captured(pipe, config(0.5, "both"), references=3).save(tmp_path / "cache")
    cache = sra.ReferenceCache.load(tmp_path / "cache")
    assert (len(cache.tokens), cache.complete) == (128, False)
    with sra.patched(pipe, config(0.5, "both")) as handle:
        wanted = CASE.call(pipe, references=3, seed=3)
        scores = handle.record.scores
        handle.reuse(cache)
        np.testing.assert_allclose(CASE.call(pipe, references=3, seed=3), wanted, atol=PIXELS)
    with sra.patched(pipe, sra.SparseRef("mass", 0.25, "cache")) as handle:  # its own selector is not asked
        handle.reuse(cache)
        CASE.call(pipe, references=3)
        assert [step.kept for step in handle.record.steps] == [64] * 3
        assert all(torch.equal(a, b) for a, b in zip(handle.record.scores, scores, strict=True))
        assert "128 of 256 tokens, and so is the ranking (FromFunction, Constant(keep=0.5" in handle.notes[0]
    for budget, error in ((0.6, "whose keys and values are held"), (1.0, "whose keys and values are held"),
                          (sra.Constant(100, per="all"), "must hold those that the budget keeps")):  # fmt: skip
        other = sra.SparseRef(sra.FromFunction(lambda refs: [torch.rand(n) for n in refs.sizes]), budget, "cache")
        other = replace(other, weights=(1.0, 1.0, 50.0)) if isinstance(budget, sra.Constant) else other
        with sra.patched(pipe, other) as handle:
            handle.reuse(cache)
            with pytest.raises(BudgetError, match=error):
                CASE.call(pipe, references=3)
    with sra.patched(pipe, sra.SparseRef("mass", sra.TopP(0.5), "cache")) as handle:
        handle.reuse(cache)
        with pytest.raises(ConfigError, match="brings its own ranking, and no attention is measured"):
            CASE.call(pipe, references=3)


def test_a_selector_that_measures_does_so_over_the_reused_keys() -> None:
    pipe, setting = CASE.build(), sra.SparseRef(sra.AttentionMass("all"), 0.25, "cache")
    cache = captured(pipe, setting, references=2)
    with sra.patched(pipe, setting) as handle:
        CASE.call(pipe, references=2)
        wanted = torch.cat(handle.record.mass)
        handle.reuse(cache)
        CASE.call(pipe, references=2)
        assert [(step.kind, step.kept) for step in handle.record.steps] == [("cached", 160)] + [("cached", 40)] * 2
        torch.testing.assert_close(torch.cat(handle.record.mass), wanted, rtol=1e-3, atol=1e-6)


def test_everything_else_is_refused_and_the_pipeline_stays_whole() -> None:
    pipe = CASE.build()
    two = {"references": 2, "steps": 2}
    dense = CASE.call(pipe, **two)
    cache = captured(pipe, config(0.3), **two)
    with sra.patched(pipe, config(0.3)) as handle:
        sparse = CASE.call(pipe, **two)

        def refused(given: sra.ReferenceCache, words: str, **request: Any) -> None:
            handle.reuse(given)
            with pytest.raises(LayoutError, match=words):
                CASE.call(pipe, **two | request)
            handle.reuse(None)
            assert np.array_equal(CASE.call(pipe, **two), sparse)

        refused(cache, "the same references' content", first=7)
        refused(cache, r"the same references' sizes, \(96, 64, 96\)", references=3)
        refused(cache, "the same references' grids", sizes=((64, 96), (64, 64)))
        refused(replace(cache, layers=cache.layers[:3]), "must have 4 layers, got 3")
        half = [(k.half(), v.half()) for k, v in cache.layers]
        refused(replace(cache, layers=half), r"in torch.float32 on cpu, got torch.float16 on cpu")
        refused(cache.to("meta"), r"on cpu, got torch.float32 on meta; ReferenceCache.to\(device\) moves it")
        refused(replace(cache, source=replace(cache.source, model="Qwen")), "the same model, .* got one of Qwen")
        refused(replace(cache, source=replace(cache.source, conditions="")), "the same call, ref_fixed_timestep=0.0")
        refused(
            replace(cache, layers=[(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)) for k, v in cache.layers]),
            "of 1 item or of the call's 1, got 3",
        )
        weight = pipe.transformer.x_embedder.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.01)
        handle.reuse(cache)
        with pytest.raises(LayoutError, match="the same model's weights"):
            CASE.call(pipe, **two)
        with torch.no_grad():
            weight.copy_(kept)
        CASE.call(pipe, **two)
    assert np.array_equal(CASE.call(pipe, **two), dense)


def test_an_adapter_makes_other_weights() -> None:
    from peft import LoraConfig

    pipe = CASE.build()
    cache = captured(pipe, config(0.3))
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    with sra.patched(pipe, config(0.3)) as handle:
        handle.reuse(cache)
        with pytest.raises(LayoutError, match="the same model's weights"):
            CASE.call(pipe)
        handle.reuse(None)
        handle.capture()
        CASE.call(pipe)
        handle.reuse(handle.reference_cache)
        CASE.call(pipe)
        pipe.transformer.set_adapters("style", 0.5)
        with pytest.raises(LayoutError, match="the same model's weights"):
            CASE.call(pipe)


def test_words_for_what_cannot_be(tmp_path: Path) -> None:
    pipe = CASE.build()
    with sra.patched(pipe, config(0.3)) as handle:
        CASE.call(pipe)
        with pytest.raises(SparseRefError, match=r"capture\(\) must be called before the run"):
            _ = handle.reference_cache
        with pytest.raises(ConfigError, match=r"takes a ReferenceCache .* got str"):
            handle.reuse("cup.safetensors")
    with pytest.raises(IncompatibleError, match=r"got FLUX\.2"):
        sra.patch(CASES["klein"].build(), sra.SparseRef("grid", 0.3)).capture()
    for name, content in (("none", None), ("text", b"hello"), ("short", b"\x08" + b"\x00" * 7)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="must be a file"):
            sra.ReferenceCache.load(tmp_path / name)
    k = torch.randn(1, 2, 1, 4, generator=generator())
    source = captured(pipe, config(0.3)).source
    with pytest.raises(LayoutError, match="must say whose ranking chose them"):
        sra.ReferenceCache([(k, k)], torch.arange(2), source)
    with pytest.raises(LayoutError, match="every layer must hold k and v"):
        sra.ReferenceCache([(k, k[:, :1])], torch.arange(2), source)


def test_a_file_is_replaced_at_once_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = captured(CASE.build(), config(0.3))
    path = tmp_path / "cache"
    cache.save(path)
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(sra.ConfigError, match="disk full"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["cache"]
