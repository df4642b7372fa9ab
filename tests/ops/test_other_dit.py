"""The example that uses the ops inside a block of its own: it trains, and the mass finds what matters."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "other_dit.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("other_dit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_and_the_attention_mass_finds_the_subject(example: ModuleType) -> None:
    model, losses = example.train(80)
    assert sum(losses[-5:]) / 5 < 0.2 * sum(losses[:5]) / 5
    dense, by_mass, at_random = example.compare(model).values()
    assert by_mass < 1.5 * dense + 0.01
    assert at_random > 5 * by_mass


def test_dropped_references_get_no_gradient(example: ModuleType) -> None:
    torch.manual_seed(0)
    batch = example.draw(3, torch.Generator().manual_seed(0))
    batch.references.requires_grad_()
    kept = example.keep(torch.rand(batch.references.shape[0]), batch.bank, 0.3)
    example.OtherDiT()(batch, kept)[0].sum().backward()
    used = torch.zeros(batch.references.shape[0], dtype=torch.bool)
    used[kept[0]] = True
    assert (batch.references.grad[~used] == 0).all()
    assert (batch.references.grad[used].abs().amax(1) > 0).all()
