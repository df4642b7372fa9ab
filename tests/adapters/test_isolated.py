"""References that run by themselves at inference: what is stored is exact, and is what training computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from tests.contract.state import kinds, state
from tests.latents import CASES
from tests.test_batch import Items

NAMES = ("kontext", "flux2", "klein", "qwen_edit_plus", "qwen_edit_plus_2511", "longcat")
names = pytest.mark.parametrize("name", NAMES)
some = pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
EACH = sra.Isolation("reference", 0.1)


def isolated(how: bool | sra.Isolation = True, select: str = "grid", budget: float = 1.0) -> sra.SparseRef:
    return sra.SparseRef(select, budget, execute=sra.Cache(isolated=how))


def several(name: str) -> int:
    return 2 if 2 in CASES[name].references else 1


def layers(cache: sra.ReferenceCache) -> list[Tensor]:
    return [x for pair in cache.layers for x in pair]


@names
@pytest.mark.parametrize("how", [sra.Isolation(), EACH], ids=["all", "each"])
def test_every_step_predicts_what_the_training_patch_does(name: str, how: sra.Isolation) -> None:
    """The same weights and inputs: one pass of the references for a run, or one in every call."""
    case, calls = CASES[name], []
    pipe = case.build()
    own = several(name)

    def given(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not calls or "output" in calls[-1]:  # a call by which the references run comes while one is prepared
            calls.append({"kwargs": {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}})

    pipe.transformer.register_forward_pre_hook(given, with_kwargs=True)
    handle = sra.patch(pipe, isolated(how))

    def gave(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        sample = output[0] if isinstance(output, tuple) else output.sample
        if sample.shape[1] == calls[-1]["kwargs"]["hidden_states"].shape[1]:
            calls[-1]["output"] = sample

    pipe.transformer.register_forward_hook(gave, with_kwargs=True)
    case.call(pipe, references=own, steps=2, cfg=case.cfg)
    assert kinds(handle) == ["cached"] * 2
    assert handle.record.exactness == "exact"
    assert len(handle.record.isolated) == (own if how is EACH else 1)
    fresh = case.build().transformer
    sra.patch_for_training(fresh, sra.IsolateReferences(how.per, how.timestep))
    assert len(calls) == sum(step.calls for step in handle.record.steps)
    for call in calls:
        with torch.no_grad():
            out = fresh(**call["kwargs"])
        wanted = out[0] if isinstance(out, tuple) else out.sample
        torch.testing.assert_close(call["output"], wanted, rtol=1e-4, atol=1e-5)


@names
def test_keys_and_values_are_the_same_bits_whatever_the_step_prompt_and_noise(name: str) -> None:
    case, own = CASES[name], several(name)
    pipe = case.build()
    handle = sra.patch(pipe, isolated())
    handle.capture()
    caches = []
    for seed, steps, prompt in ((0, 1, "a cup on a table"), (1, 2, "seven blue birds and a horse"), (2, 1, "x")):
        case.call(pipe, references=own, steps=steps, seed=seed, prompt=prompt)
        caches.append(handle.reference_cache)
    for other in caches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(layers(caches[0]), layers(other), strict=True))
    case.call(pipe, references=own, steps=1, first=7)
    assert not all(torch.equal(a, b) for a, b in zip(layers(caches[0]), layers(handle.reference_cache), strict=True))


@some
def test_a_saved_cache_serves_another_prompt_and_seed(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = case.build()
    other: dict[str, Any] = {"seed": 5, "prompt": "another one", "steps": 3}
    handle = sra.patch(pipe, isolated())
    wanted = case.call(pipe, **other)
    handle.capture()
    case.call(pipe, steps=2)
    handle.reference_cache.save(tmp_path / "cup.safetensors")
    handle.remove()
    fresh = case.build()
    handle = sra.patch(fresh, isolated())
    handle.reuse(sra.ReferenceCache.load(tmp_path / "cup.safetensors"))
    assert np.array_equal(case.call(fresh, **other), wanted)
    assert handle.record.isolated == ()
    assert "are those of an earlier run" in handle.notes[0]
    with pytest.raises(sra.LayoutError, match="same references' content"):
        case.call(fresh, steps=2, first=7)
    handle.remove()
    handle = sra.patch(fresh, isolated(EACH))
    handle.reuse(sra.ReferenceCache.load(tmp_path / "cup.safetensors"))
    with pytest.raises(sra.LayoutError, match="must be of the same call"):
        case.call(fresh, steps=2)
    handle.remove()
    handle = sra.patch(fresh, isolated())
    handle.reuse(sra.ReferenceCache.load(tmp_path / "cup.safetensors"))
    with torch.no_grad():
        for weight in fresh.transformer.parameters():
            weight.add_(0.01)
    with pytest.raises(sra.LayoutError, match="must be of the same model's weights"):
        case.call(fresh, steps=2)


@pytest.mark.parametrize("cfg", [False, True])
def test_references_run_once_for_all_branches_of_guidance(cfg: bool) -> None:
    pipe, rows = CASES["klein"].build(), []
    pipe.transformer.x_embedder.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    handle = sra.patch(pipe, isolated())
    CASES["klein"].call(pipe, references=2, steps=3, cfg=cfg)
    layout = handle.record.layout
    assert rows == [layout.reference_tokens, *[layout.generation[1]] * (6 if cfg else 3)]
    flops, width = handle.flops(), 16
    estimated = sra.estimate(
        pipe, isolated(), references=[(r.grid[1] * width, r.grid[0] * width) for r in layout.references], steps=3,
        output=(8 * width, 8 * width), text_tokens=layout.text, calls_per_step=1 + cfg, pixels_per_token=width,
    )  # fmt: skip
    assert (flops.dense_tflop, flops.sparse_tflop) == (estimated.dense.total / 1e12, estimated.sparse.total / 1e12)
    assert estimated.kinds == ("cached",) * 3


@some
def test_a_measured_ranking_reads_a_part_and_no_step_is_full(name: str) -> None:
    pipe = CASES[name].build()
    handle = sra.patch(pipe, isolated(select="mass", budget=0.25))
    CASES[name].call(pipe, steps=3)
    tokens = handle.record.layout.reference_tokens
    assert [(step.kind, step.kept) for step in handle.record.steps] == [
        ("cached", tokens), ("cached", tokens // 4), ("cached", tokens // 4),
    ]  # fmt: skip
    assert handle.record.mass is not None
    assert "exact: the references see neither" in handle.summary()


@names
def test_remove_leaves_nothing_behind(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    wanted = case.call(pipe, steps=2)
    before = state(pipe)
    with sra.patched(pipe, isolated()):
        assert not np.array_equal(case.call(pipe, steps=2), wanted)
        assert state(pipe) != before
    assert state(pipe) == before
    assert np.array_equal(case.call(pipe, steps=2), wanted)


def test_compiled_blocks_read_compiled() -> None:
    torch._dynamo.reset()
    case, graphs = CASES["klein"], []
    pipe, plain = (case.build(layers=1, single=1) for _ in range(2))
    sra.patch(plain, isolated())
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=lambda graph, inputs: graphs.append(1) or graph)
    sra.patch(pipe, isolated())
    np.testing.assert_allclose(case.call(pipe, steps=2), case.call(plain, steps=2), atol=1e-5)
    assert graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["klein", "qwen_edit_plus"])
def test_a_batch_has_the_pictures_of_single_runs(name: str) -> None:
    items = Items(CASES[name], CASES[name].build(), none=False)
    pictures, steps = items.alone(isolated())
    done = items.together(isolated())
    assert {kind for own in steps for kind, _ in own} == {"cached"}
    for got, wanted in zip(done.images, pictures, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def trained(folder: Path, said: str | None, name: str = "kontext") -> Any:
    """A pipeline whose transformer was loaded from a folder with that beside its weights."""
    pipe = CASES[name].build()
    pipe.transformer.save_pretrained(folder)
    if said is not None:
        (folder / "sparse_ref_attn.json").write_text(said)
    pipe.transformer = type(pipe.transformer).from_pretrained(folder)
    return pipe


def test_the_weights_say_how_they_were_trained(tmp_path: Path) -> None:
    case, said = CASES["kontext"], EACH.to_dict()
    pipe = trained(tmp_path, json.dumps({"isolate": said}))
    with sra.patched(pipe, isolated()) as handle:
        wanted = case.call(pipe, steps=3)
        assert handle.record.exactness == "exact"
    with sra.patched(CASES["kontext"].build(), isolated()):
        pass
    for config in (None, "fast", "faithful", sra.SparseRef("grid", 1.0, "cache")):
        with sra.patched(pipe, config) as handle:
            assert np.array_equal(case.call(pipe, steps=3), wanted)
            assert kinds(handle) == ["cached"] * 3
            assert any("has no meaning" in note for note in handle.notes) == (handle.config.refresh is not None)
    for config, error, words in (
        (
            "sparse-context",
            sra.IncompatibleError,
            "that run by themselves.*a preset with a cache",
        ),
        (sra.SparseRef("grid", 1.0, "cache", isolated=False), sra.IncompatibleError, "that run by themselves"),
        (
            isolated(sra.Isolation()),
            sra.IncompatibleError,
            r"trained with Isolation\(per='reference', timestep=0.1",
        ),
        (sra.SparseRef("mass", 0.25, "cache", per="tile"), sra.ConfigError, 'isolated goes with per="run"'),
        (sra.SparseRef("grid", 0.25, "both"), sra.ConfigError, 'isolated goes with first="all"'),
    ):
        with pytest.raises(error, match=words):
            sra.patch(pipe, config)


def test_weights_that_say_otherwise_and_files_that_say_nothing(tmp_path: Path) -> None:
    pipe = trained(tmp_path / "joint", '{"isolate": null}')
    with pytest.raises(sra.IncompatibleError, match="trained with references that see the picture"):
        sra.patch(pipe, isolated())
    sra.patch(pipe).remove()
    sra.patch(trained(tmp_path / "older", '{"random_drop": null}'), isolated())
    for i, said in enumerate(("[]", "{", '{"isolate": {"par": 1}}')):
        with pytest.raises(sra.ConfigError, match=r"must be a JSON object|must have per and timestep alone"):
            sra.patch(trained(tmp_path / str(i), said))


def test_klein_kv_does_it_already() -> None:
    case = CASES["klein_kv"]
    pipe = case.build()
    with sra.patched(pipe, sra.SparseRef("grid", 0.5, "cache")):
        wanted = case.call(pipe, steps=3)
    with sra.patched(pipe, isolated(budget=0.5)) as handle:
        assert np.array_equal(case.call(pipe, steps=3), wanted)
        assert handle.record.exactness == "exact"


def test_a_model_that_does_it_already_in_a_pipeline_that_does_not_is_refused() -> None:
    """It ran its references with the picture, now and then, as if nothing had been asked."""
    plain = CASES["klein"].build()
    plain.transformer = CASES["klein_kv"].build().transformer
    with sra.patched(plain, isolated()), pytest.raises(sra.IncompatibleError, match="must run in the pipeline that"):
        CASES["klein"].call(plain, steps=2)


def test_bad_input() -> None:
    for settings, said in (
        ({"isolated": 1}, "isolated must be a bool, an Isolation or None, got 1"),
        ({"isolated": True, "refresh": sra.Never()}, "isolated goes without refresh"),
        ({"isolated": True, "first": "kept"}, 'isolated goes with first="all": every reference token runs'),
        ({"isolated": True, "per": "tile"}, 'isolated goes with per="run"'),
    ):
        with pytest.raises(sra.ConfigError, match=said):
            sra.Cache(**settings)
    with pytest.raises(sra.ConfigError, match='isolated must come with execute="cache"'):
        sra.SparseRef("grid", 1.0, isolated=True)
    config = isolated(EACH)
    assert sra.SparseRef.from_json(config.to_json()) == config
    assert copy.deepcopy(config) == config
    pipe = CASES["klein"].build()
    handle = sra.patch(pipe, sra.SparseRef("grid", 1.0, "cache"))
    with pytest.raises(sra.IncompatibleError, match="or references that run by themselves"):
        handle.capture()
    sra.patch(pipe, isolated())
    pipe.transformer.enable_cache(__import__("diffusers").FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(sra.IncompatibleError, match="go without a step cache"):
        CASES["klein"].call(pipe, steps=2)
