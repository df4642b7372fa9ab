"""What `patch` does reaches the dispatch: on a device with verdicts, each of its calls goes to the backend they name.

A stand-in is that backend, on a CPU that is judged as a card is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.ops.verdicts import dispatch, store
from sparse_ref_attn.patching import proving
from tests.latents import CASES
from tests.stand_in_backend import calls, judged
from tests.training.batches import Batch, build, lora

SMALL = {"height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False}


@pytest.fixture(autouse=True)
def card(tmp_path: Path) -> Iterator[None]:
    with judged(tmp_path):
        yield


def picture(name: str, config: sra.SparseRef | None = None, steps: int = 4) -> Any:
    case = CASES[name]
    pipe = case.build(heads=3)
    handle = None if config is None else sra.patch(pipe, config)
    calls.clear()
    out = case.call(pipe, references=1, steps=steps)
    return torch.as_tensor(out), handle


def reached() -> set[str]:
    return {name for name, _ in calls}


def measured_inside_blocks(monkeypatch: pytest.MonkeyPatch, transformer: Any) -> list[str]:
    """Verdicts that are got while a block runs: none should be."""
    inside, found = [False], []
    real = dispatch.judge

    def judge(kind: Any, trial: Any) -> Any:
        if inside[0]:
            found.append(kind.name)
        return real(kind, trial)

    monkeypatch.setattr(dispatch, "judge", judge)
    for block in [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]:
        block.register_forward_pre_hook(lambda *of: inside.__setitem__(0, True))
        block.register_forward_hook(lambda *of: inside.__setitem__(0, False))
    return found


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
def test_profiling_and_dropping(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    pipe = case.build(heads=3)
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.5))
    late = measured_inside_blocks(monkeypatch, pipe.transformer)
    got = case.call(pipe, references=1, steps=3)
    assert {"mass", "pack", "unpack"} <= reached()
    assert handle.record.steps[1].kind == "sparse"
    assert late == []
    judged_ops = {kind.op for kind in store.known()}
    assert judged_ops == {"attention_mass", "pack_rows"}
    assert torch.as_tensor(got).shape


def test_cached_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """They attend to the stored rows by gather_attention, and the picture is that of the ranked prefix."""
    config = sra.SparseRef("mass", 0.5, "cache")
    got, handle = picture("klein_kv", config)
    assert {step.kind for step in handle.record.steps} == {"profile", "cached"}
    kept = handle.record.steps[1].kept
    banks = [a.ref_indices.shape[0] for name, a in calls if name == "forward" and a.ref_indices is not None]
    cached = [n for n in banks if n == kept]
    assert len(cached) == 3 * len(handle._generations.adapter.sites(handle._transformer()))
    monkeypatch.setattr(proving, "JUDGED", set())
    want, _ = picture("klein_kv", config)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_backend_that_the_user_chose_stays() -> None:
    case = CASES["klein_kv"]
    pipe = case.build(heads=3)
    pipe.transformer.set_attention_backend("native")
    sra.patch(pipe, sra.SparseRef("grid", 0.5, "cache"))
    calls.clear()
    case.call(pipe, references=1, steps=3)
    assert "forward" not in reached()


def test_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = kontext_pipeline(size="tiny")
    pipe.set_progress_bar_config(disable=True)
    late = measured_inside_blocks(monkeypatch, pipe.transformer)
    images = [[PIL.Image.new("RGB", (32, 32), "red")], [PIL.Image.new("RGB", (64, 32), "blue")]]
    sra.batch(pipe, ["a cat", "a dog"], images, config=sra.SparseRef("mass", 0.5), num_inference_steps=2, **SMALL)
    ragged = [a.items for name, a in calls if name == "forward" and a.q.shape[0] > 136]
    assert ragged
    assert set(ragged) == {2}
    assert {"mass", "pack", "unpack"} <= reached()
    assert [name for name in late if name.startswith("gather_attention")] == []


def test_training_with_counts_of_each_item(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = lora(build("kontext")), Batch("kontext", items=3)
    late = measured_inside_blocks(monkeypatch, model)
    handle = sra.patch_for_training(model, sra.RandomDrop(keep=(0.1, 1.0), per_sample=True, seed=3))
    batch.loss(model).backward()
    handle.remove()
    kinds = [kind for kind in store.known() if kind.op == "gather_attention"]
    assert {kind.gradients for kind in kinds} <= {True, False}
    assert any(kind.gradients and kind.several for kind in kinds)
    assert {"forward", "backward", "pack", "unpack"} <= reached()
    assert [name for name in late if name.startswith("gather_attention") and "with gradients" in name] == []
