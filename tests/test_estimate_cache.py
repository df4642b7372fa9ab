"""Estimates of runs that store their references' keys and values, against sums by hand."""

from __future__ import annotations

from functools import cache

import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.estimation import estimate
from sparse_ref_attn.models import named_model

published = cache(named_model)


@pytest.mark.parametrize(
    ("execute", "keep", "ratio"),
    [("tokens", 0.25, 3.25), ("cache", 0.25, 2.83), ("both", 0.25, 5.14), ("cache", 1.0, 2.53), ("both", 0.1, 6.13)],
)
def test_klein_with_four_references(execute, keep, ratio):
    """Against plain Klein. The extract step's references look at themselves alone, which a joint step's do not."""
    e = estimate(
        published("klein-9b-kv"), references=[(1024, 1024)] * 4, steps=4, config=sra.SparseRef("edges", keep, execute)
    )
    assert e.flop_ratio == pytest.approx(ratio, abs=0.005)
    kept = 4 * round(4096 * keep)
    if execute == "tokens":
        assert (e.kinds, e.memory.room) == (("sparse",) * 4, 0)
        return
    first = kept if execute == "both" else 16384
    assert e.tokens == (first, kept, kept, kept)
    assert e.kinds[1:] == ("cached",) * 3
    pairs = (4608 * (4608 + first) + first**2) + 3 * 4608 * (4608 + kept)
    assert e.sparse.attention == 4 * 32 * 32 * 128 * pairs
    assert e.memory.sparse_reference_kv == 2 * 32 * kept * 32 * 128 * 2
    assert e.memory.room == (0 if keep == 1 else 2 * 16 * 4608 * 32 * 128 * 2)


def test_layers_and_rankings_made_again_are_counted():
    model, call = published("klein-9b-kv"), {"references": [(1024, 1024)], "steps": 9}
    halves = sra.SparseRef("edges", 0.5, "both", layers=(0.5,) * 16 + (1.0,) * 16)
    whole, half = (estimate(model, config=c, **call) for c in (sra.SparseRef("edges", 0.5, "both"), halves))
    saved = 8 * 4 * 16 * 32 * 128 * 4608 * 1024  # steps, two products, layers, width, queries, keys not read
    assert whole.sparse.attention - half.sparse.attention == saved
    assert whole.sparse.matmul == half.sparse.matmul
    once, thrice = (
        estimate(model, config=sra.SparseRef("mass", 0.25, execute, rerank_every=every), **call)
        for execute, every in (("cache", None), ("cache", 4))
    )
    # on stored keys the LSE is of the keys that were read, not of all: the later two go over every key
    assert once.scoring.total % 4096 == 0
    assert thrice.scoring.total == once.scoring.total + 2 * once.scoring.total // 4096 * (512 + 4096 + 4096)
    assert thrice.kinds == once.kinds
    dense = estimate(model, config=sra.SparseRef("mass", 0.25, rerank_every=4), **call)
    assert [i for i, kind in enumerate(dense.kinds) if kind == "profile"] == [0, 4, 8]
    assert dense.mean_tokens == (3 * 4096 + 6 * 1024) / 9
