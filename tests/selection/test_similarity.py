"""Cosine against the formula written out in fp64."""

from __future__ import annotations

import pytest
import torch

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.selection import Cosine, Random

from .scenes import recall, references


def explicit(rows):
    unit = rows.double() / rows.double().norm(dim=-1, keepdim=True)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    return (cosine.sum(-1) / (rows.shape[-2] - 1)).mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_mean_cosine_to_the_others(dtype):
    refs = references([(5, 7), (1, 2)], batch=2)
    refs.tokens = refs.tokens.to(dtype)
    for rows, similar, distinct in zip(
        refs.split(refs.tokens), Cosine("similar").score(refs), Cosine("distinct").score(refs), strict=True
    ):
        torch.testing.assert_close(similar.double(), explicit(rows), atol=1e-6, rtol=0)
        assert torch.equal(distinct, -similar)


def test_distinct_finds_the_odd_tokens():
    """49 background tokens that point one way, 15 that each point their own: distinct keeps those 15."""
    tokens = torch.ones(1, 64, 32) + 0.1 * torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    subject = torch.zeros(64)
    subject[20:35] = 1
    tokens[0, 20:35] = torch.randn(15, 32, generator=torch.Generator().manual_seed(1))
    refs = references([(8, 8)], tokens=tokens)
    assert recall(Cosine("distinct").score(refs)[0], subject) == 1.0
    assert recall(Cosine("similar").score(refs)[0], subject) == 0.0
    assert recall(Random().score(refs)[0], subject) <= 0.5


def test_zero_and_single_tokens_are_neutral():
    refs = references([(1, 1), (1, 3)], tokens=torch.tensor([[[2.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]]))
    assert [s.tolist() for s in Cosine("similar").score(refs)] == [[0.0], [0.0, 0.5, 0.5]]


def test_nan_is_not_hidden():
    refs = references([(2, 2)])
    refs.tokens[0, 1, 3] = torch.nan
    assert Cosine().score(refs)[0].isnan().any()


def test_sign_must_be_one_of_two():
    with pytest.raises(ConfigError, match="distinct"):
        Cosine("dissimilar")
