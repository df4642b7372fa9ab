"""Ranking again every n steps: dense and charged where tokens are dropped, over stored keys where they are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.errors import BudgetError, ConfigError, LayoutError
from sparse_ref_attn.selection.stability import overlap, spearman
from tests.adapters.test_cache import CASE, config
from tests.adapters.test_reuse import captured
from tests.adapters.witnesses import GENERATION, witnessed
from tests.latents import CASES


def setting(execute: str, every: int, budget: float = 0.25, stride: int = 1) -> sra.SparseRef:
    return sra.SparseRef(sra.AttentionMass("all", query_stride=stride), budget, execute, rerank_every=every)


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
@torch.no_grad()
def test_with_tokens_it_is_a_dense_step_that_is_charged(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    with sra.patched(pipe, setting("tokens", 2)) as handle, witnessed(pipe.transformer) as calls:
        case.call(pipe, steps=6)
    record, sizes = handle.record, handle.record.layout.sizes
    total, quarter = sum(sizes), sum(round(size / 4) for size in sizes)
    kinds = ["profile", "sparse"] * 3
    assert [step.kind for step in record.steps] == kinds
    assert [step.kept for step in record.steps] == [total, quarter] * 3
    assert handle.summary("dict")["reference_tokens"]["mean_per_step"] == (total + quarter) / 2
    assert [entry.step for entry in record.stability] == [2, 4]
    work = handle.flops()
    assert work is not None
    with sra.patched(pipe, setting("tokens", 100)) as once:
        case.call(pipe, steps=6)
    assert once.record.scoring_flops * 3 == record.scoring_flops
    assert once.flops().sparse_tflop < work.sparse_tflop < work.dense_tflop + record.scoring_flops / 1e12
    # The last ranking is that of the last measured step alone.
    fresh = case.build().transformer
    with sra.patched(fresh, setting("tokens", 100)) as handle:
        handle.begin(steps=2)
        fresh(**calls[4].given)
        handle.step(1)
        fresh(**calls[5].given)
        for mine, wanted in zip(record.scores, handle.record.scores, strict=True):
            torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("stride", [1, 3])
@torch.no_grad()
def test_with_the_cache_it_reads_all_stored_keys_and_no_step_is_dense(stride: int) -> None:
    pipe = CASE.build()
    with sra.patched(pipe, setting("cache", 2, stride=stride)) as handle, witnessed(pipe.transformer) as calls:
        CASE.call(pipe, references=3, steps=6)
    record, text = handle.record, calls[0].text
    assert [(step.kind, step.kept) for step in record.steps] == [("profile", 256)] + [("cached", 64)] * 5
    for call in calls[1:]:
        assert {a.k.shape[1] for a in call.attention} == {text + GENERATION + 64}
    assert [entry.step for entry in record.stability] == [2, 4]
    queries = -(-GENERATION // stride)
    # step 0 is given its LSE; the later ones attend to other keys than those that they measure
    assert record.scoring_flops == 4 * 2 * queries * (256 + 2 * (text + GENERATION + 256)) * 2 * 16
    # What was measured in step 4: all stored keys, by the queries of the sparse step.
    fresh = CASE.model()
    _, cache = fresh(**calls[0].given)
    layers = [*cache.double_block_caches, *cache.single_block_caches]
    masses = []
    for attention, layer in zip(calls[4].attention, layers, strict=True):
        q = attention.q[:, text:][:, ::stride].double()
        stored = layer.get()[0].double()
        mine = attention.k.double()
        known = (mine[:, :, None] - stored[:, None]).abs().amax((-1, -2)).min(2).values < 1e-4
        rest = mine[:, ~known[0]]
        assert rest.shape[1] == text + GENERATION
        scores = torch.einsum("bqhc,bkhc->bhqk", q, torch.cat([rest, stored], 1)) * 16**-0.5
        masses.append(scores.softmax(-1)[..., text + GENERATION :].mean((0, 1, 2)))
    wanted = torch.stack(masses).mean(0)
    torch.testing.assert_close(torch.cat(record.scores).double(), wanted, rtol=1e-3, atol=1e-7)
    # Steps after it attend to the best of the new ranking.
    best = [part.argsort(descending=True)[: round(len(part) / 4)] for part in wanted.split(record.layout.sizes)]
    starts = np.cumsum([0, *record.layout.sizes])
    kept = torch.cat([b + int(s) for b, s in zip(best, starts, strict=False)]).sort().values
    assert torch.equal(record.steps[5].selection.indices, kept)
    for attention, layer in zip(calls[5].attention, layers, strict=True):
        near = (attention.k[:, :, None] - layer.get()[0][:, None, kept]).abs().amax((-1, -2))[0]
        assert int((near.min(1).values < 1e-5).sum()) == 64


@pytest.mark.parametrize("execute", ["tokens", "cache"])
def test_the_stability_is_what_the_two_rankings_say(execute: str) -> None:
    pipe = CASE.build() if execute == "cache" else CASES["klein"].build()
    scores, kept = [], []

    def look(pipe: object, step: int, time: object, values: dict) -> dict:
        if handle._generations.record.scores is not None:
            scores.append([s.clone() for s in handle._generations.record.scores])
            kept.append(handle._generations.record.steps[-1].selection)
        return {}

    with sra.patched(pipe, setting(execute, 2)) as handle:
        CASE.call(pipe, references=2, steps=4, callback=look)
        first, last = scores[0], handle.record.scores
        (entry,) = handle.record.stability
    assert entry.step == 2
    ranks = [[np.argsort(np.argsort(s.numpy())) for s in each] for each in (first, last)]
    wanted = [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]
    np.testing.assert_allclose(entry.spearman, wanted, atol=1e-6)
    before, after = kept[0].indices.tolist(), handle.record.steps[-1].selection.indices.tolist()
    assert entry.overlap == pytest.approx(len({*before} & {*after}) / len(before))
    assert 0 < entry.overlap <= 1


def test_measures_of_stability() -> None:
    a, b = [torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([3.0, 2.0, 1.0])]
    assert spearman(a, b) == [-1.0]
    assert overlap(torch.tensor([], dtype=torch.long), torch.tensor([1])) == 1.0
    with pytest.raises(LayoutError, match="of the same sizes"):
        spearman(a, [b[0][:2]])


def test_what_cannot_be_ranked_again_is_refused() -> None:
    with pytest.raises(ConfigError, match="a selector that measures attention, got Edges"):
        sra.SparseRef("edges", 0.25, rerank_every=2)
    with pytest.raises(ConfigError, match='execute="both" never computes'):
        sra.SparseRef("mass", 0.25, "both", rerank_every=2)
    with pytest.raises(ConfigError, match="no queries of the reference tokens"):
        sra.SparseRef(sra.SelfAttention(), 0.25, "cache", rerank_every=2)
    with pytest.raises(ConfigError, match="an int of at least 1, got 0"):
        sra.SparseRef("mass", 0.25, rerank_every=0)
    pipe = CASE.build()
    part = captured(pipe, config(0.5, "both"))
    with sra.patched(pipe, setting("cache", 1)) as handle:
        handle.reuse(part)
        with pytest.raises(BudgetError, match="whose keys and values are held"):
            CASE.call(pipe, steps=3)
