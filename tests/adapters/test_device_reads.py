"""Items of different lengths, in generation and in training: no attention layer reads a length from the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.patching.execution import ragged_rows
from sparse_ref_attn.patching.execution.ragged import Item
from tests.adapters.test_ragged import TRANSFORMERS, install, items_for, transformer_of
from tests.device_reads import device_reads
from tests.training.batches import MODELS, Batch, build, lora


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_joined_call(name: str, listening: bool) -> None:
    transformer = transformer_of(name)
    seen: list[int] = []

    def tap(item: int, site: int, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> None:
        seen.append(item)

    hooks = install(transformer)
    items = [Item(kwargs) for kwargs in items_for(transformer)]
    with torch.no_grad(), hooks.joined(items, tap=tap if listening else None) as call, device_reads() as reads:
        call.outputs(transformer(**call.kwargs))
    hooks.remove()
    assert reads == []
    assert len(seen) == (3 * 3 if listening and not name.startswith("qwen") else 3 * 2 if listening else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_with_counts_of_each_item(name: str, checkpointing: bool) -> None:
    model, batch = lora(build(name)), Batch(name, items=3)
    if checkpointing:
        model.enable_gradient_checkpointing()
    handle = sra.patch_for_training(model, sra.RandomDrop(keep=(0.1, 1.0), per_sample=True, seed=3))
    with device_reads(inside="attend") as forward:
        loss = batch.loss(model)
    assert len({selection.kept for selection in handle.kept}) > 1
    with device_reads() as backward:
        loss.backward()
    handle.remove()
    assert forward == []
    assert backward == []
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_a_layer_without_them_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the counting sees when the lengths do not travel."""
    monkeypatch.setattr(ragged_rows, "HostOffsets", lambda *numbers: None)
    transformer = transformer_of("kontext")
    hooks = install(transformer)
    items = [Item(kwargs) for kwargs in items_for(transformer)]
    with torch.no_grad(), hooks.joined(items) as call, device_reads() as reads:
        transformer(**call.kwargs)
    hooks.remove()
    assert len(reads) == 2 * len(transformer.transformer_blocks) + 2 * len(transformer.single_transformer_blocks)
