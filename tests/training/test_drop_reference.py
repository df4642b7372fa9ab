"""Dropping as a function: the same draws as the settings say, exact gradients, refusals."""

from __future__ import annotations

import pytest
import torch

import sparse_ref_attn as sra
from tests.pictures import generator


def test_tokens_and_ids_go_together() -> None:
    tokens = torch.arange(24.0).view(1, 24, 1).expand(3, 24, 2)
    ids = torch.arange(24)[:, None].expand(24, 3)
    for given in (ids, ids.expand(3, 24, 3)):
        kept = sra.drop_reference(tokens, given, keep=(0.2, 0.9), generator=generator(1))
        expected = sra.RandomDrop((0.2, 0.9)).draw((24,), generator(1)).indices
        assert torch.equal(kept.indices, expected)
        assert torch.equal(kept.tokens, tokens[:, expected])
        assert torch.equal(kept.ids, given[..., expected, :])
    assert sra.drop_reference(tokens, keep=0.5).ids is None


def test_dropped_tokens_get_no_gradient() -> None:
    tokens = torch.randn(2, 30, 4, generator=generator(), requires_grad=True)
    kept = sra.drop_reference(tokens, keep=0.4, generator=generator())
    kept.tokens.pow(2).sum().backward()
    expected = torch.zeros_like(tokens)
    expected[:, kept.indices] = 2 * tokens.detach()[:, kept.indices]
    assert torch.equal(tokens.grad, expected)


def test_floors_need_to_know_the_references() -> None:
    tokens = torch.zeros(1, 20, 1)
    for seed in range(20):
        kept = sra.drop_reference(
            tokens, keep=0.1, sizes=(16, 4), floor_per_reference=2, generator=generator(seed)
        ).indices
        assert ((kept < 16).sum(), (kept >= 16).sum()) == (2, 2)


def test_settings_are_those_of_random_drop() -> None:
    tokens = torch.zeros(1, 50, 1)
    kept = sra.drop_reference(tokens, keep=(0.1, 0.9), distribution="arcsine", generator=generator(3))
    assert torch.equal(kept.indices, sra.RandomDrop((0.1, 0.9), "arcsine").draw((50,), generator(3)).indices)
    assert sra.drop_reference(tokens, keep=0.1, full_probability=1.0).tokens.shape == (1, 50, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": torch.zeros(8, 4)}, r"tokens must be reference rows \(B, R, D\) with R >= 1, got \(8, 4\)"),
        ({"tokens": torch.zeros(1, 0, 4)}, r"with R >= 1, got \(1, 0, 4\)"),
        ({"ids": torch.zeros(7, 3)}, r"ids must be \(R, A\) or \(B, R, A\) with R = 8, got \(7, 3\)"),
        ({"sizes": (4, 3)}, r"sum to the 8 reference rows, got \(4, 3\)"),
        ({"sizes": (8, 0)}, r"sizes must be at least 1 each"),
        ({"keep": (0, 0.5)}, "0 < low"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    with pytest.raises(sra.SparseRefError, match=words):
        sra.drop_reference(**{"tokens": torch.zeros(1, 8, 4), **arguments})
