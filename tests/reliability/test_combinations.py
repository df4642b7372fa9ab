"""Settings that are seldom used together: they do what each does alone, or are refused before anything is patched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from tests.contract.state import state
from tests.latents import CASES
from tests.pictures import picture
from tests.reliability.alike import alike
from tests.reliability.drawn_batch import BatchItems

KV = CASES["klein_kv"]
RISING = sra.Linear(0.2, 0.6)
SHAPES = ((64, 64), (128, 64), (64, 96), (96, 128), (64, 128))

SELDOM = {
    "reranked": sra.SparseRef("mass", RISING, "cache", rerank_every=1),
    "reranked, all rows": sra.SparseRef("mass", RISING, "cache", rerank_every=2, cache_rows="all"),
    "layers": sra.SparseRef(sra.Cosine(), RISING, "cache", layers=(1.0, 0.5, 0.25, 0.8)),
    "layers of both": sra.SparseRef("mass", 0.5, "both", layers=(0.5, 1.0, 0.5, 1.0)),
    "guarded": sra.SparseRef("mass", 0.2, "both", guard=sra.config.UniformGuard(1.0, 0.5)),
    "by mass": sra.SparseRef("cosine", sra.TopP(0.6, per="all"), "cache", floor=0.1),
    "shared": sra.SparseRef("grid", sra.Descending(0.6, 0.2, per="all"), "both", weights=None, multiple=8),
}
BATCHES = dict(zip(SELDOM, (0, 0, 1, 1, 1, 0, 0), strict=True))
"""Of each the seed of a draw of several items."""


@pytest.mark.parametrize("name", list(SELDOM))
def test_batches_of_cached_pipelines(name: str) -> None:
    """Items of other numbers and sizes of references, each as it is alone: picture, kept counts, cache bytes."""
    pipe, config = KV.build(), SELDOM[name]
    items = BatchItems(Random(f"{name} {BATCHES[name]}"), KV, pipe)
    KV.call(pipe)
    before = state(pipe)
    done = items.together(pipe, config)
    assert state(pipe) == before
    assert [len(images) for images in items.images] == [
        len(handle.record.layout.references) if images else 0
        for handle, images in zip(done.handles, items.images, strict=True)
    ]
    for i, (handle, images) in enumerate(zip(done.handles, items.images, strict=True)):
        image, record = items.alone(pipe, config, i)
        if images:
            told = [[(s.kind, s.kept, s.layers, s.cache_bytes) for s in r.steps] for r in (record, handle.record)]
            assert told[0] == told[1]
            steps = zip(record.steps, handle.record.steps, strict=True)
            assert all(alike(a.selection, b.selection) for a, b in steps)
        np.testing.assert_allclose(done.outputs[i].images, image, rtol=0, atol=5e-5)


def call(pipe: Any, shapes: tuple[tuple[int, int], ...], **more: Any) -> np.ndarray:
    images = [picture(*shape, i) for i, shape in enumerate(shapes)]
    return KV.call(pipe, references=1, image=images, **more)


@pytest.mark.parametrize(("count", "execute"), [(1, "cache"), (2, "both"), (5, "cache")])
def test_captured_and_reused(count: int, execute: str, tmp_path: Path) -> None:
    """The K/V of several references of other shapes, through a file: as computing them anew, for another seed."""
    pipe, config = KV.build(), sra.SparseRef(sra.Cosine(), 0.4, execute)
    shapes = SHAPES[:count]
    with sra.patched(pipe, config) as handle:
        handle.capture()
        call(pipe, shapes)
        handle.reference_cache.save(tmp_path / "cache")
        handle.capture(False)
        wanted = call(pipe, shapes, seed=4)
        steps = [(step.kept, step.selection) for step in handle.record.steps[1:]]
        cache = sra.ReferenceCache.load(tmp_path / "cache")
        assert cache.source.sizes == tuple(width * height // 64 for width, height in shapes)
        assert cache.complete == (execute == "cache")
        handle.reuse(cache)
        image = call(pipe, shapes, seed=4)
        for (kept, selection), step in zip(steps, handle.record.steps[1:], strict=True):
            assert step.kept == kept
            assert alike(selection, step.selection)
        if execute == "both":  # the same rows in every step; with "cache" the first step computes all when it is anew
            np.testing.assert_allclose(image, wanted, rtol=0, atol=1e-4)
        for others in (shapes[::-1], (*shapes, (64, 64)), shapes[1:]):
            if others and others != shapes:
                with pytest.raises(sra.LayoutError, match="reused reference cache must be of the same"):
                    call(pipe, others)
        assert np.array_equal(call(pipe, shapes, seed=4), image)
        handle.reuse(None)
        assert np.array_equal(call(pipe, shapes, seed=4), wanted)


def test_a_cache_of_another_order_of_rows_is_the_same() -> None:
    """Whose tokens are held matters, not how they were come by: rerank, layers and all rows read a reused cache too."""
    pipe = KV.build()
    shapes = tuple(Random(0).sample(SHAPES, 3))
    base = sra.SparseRef("mass", RISING, "cache")
    with sra.patched(pipe, base) as handle:
        handle.capture()
        call(pipe, shapes)
        cache = handle.reference_cache
    for config in (replace(base, rerank_every=1), replace(base, cache_rows="all"), SELDOM["layers"], SELDOM["by mass"]):
        with sra.patched(pipe, config) as handle:
            call(pipe, shapes)
            own = [(step.kept, step.layers) for step in handle.record.steps[1:]]
            handle.reuse(cache)
            image = call(pipe, shapes)
            assert np.isfinite(image).all()
            assert [(step.kept, step.layers) for step in handle.record.steps[1:]] == own
            assert all(step.kind in ("cached", "profile") for step in handle.record.steps)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("klein_kv", {"execute": "cache", "profile": "in_flight"}),
        ("klein_kv", {"execute": "both", "profile": "in_flight"}),
        ("klein_kv", {"execute": "both", "rerank_every": 1}),
        ("klein_kv", {"execute": "cache", "from_block": 1}),
        ("klein_kv", {"execute": "cache", "rerank_every": 1, "layers": (1.0, 0.5, 0.25, 0.8)}),  # IndexError in mid-run
        ("klein", {"execute": "cache", "layers": (0.5,) * 3}),
        ("klein", {"execute": "tokens", "refresh": sra.Never()}),
        ("klein", {"execute": "tokens", "layers": (0.5,) * 4}),
        ("klein", {"profile": "in_flight", "rerank_every": 1}),
        ("klein_kv", {"execute": "cache", "layers": (0.5,) * 3}),
    ],
)
def test_refused_before_anything_is_patched(name: str, settings: dict[str, Any]) -> None:
    pipe = CASES[name].build()
    before = state(pipe)
    with pytest.raises((sra.ConfigError, sra.IncompatibleError)):
        sra.patch(pipe, sra.SparseRef("mass", 0.3, **settings))
    assert state(pipe) == before


@pytest.mark.parametrize("settings", [{"from_block": 1}, {"profile": "in_flight"}])
def test_depth_on_a_model_that_stores_keys(settings: dict[str, Any]) -> None:
    """Refused at the first call, and a call without references is none of its business."""
    pipe = KV.build()
    dense, alone = KV.call(pipe, references=2), KV.call(pipe, references=0)
    with sra.patched(pipe, sra.SparseRef("mass", 0.3, **settings)):
        before = state(pipe)
        with pytest.raises(sra.IncompatibleError, match="stores the references' keys and values"):
            KV.call(pipe, references=2)
        assert state(pipe) == before
        assert np.array_equal(KV.call(pipe, references=0), alone)
    assert np.array_equal(KV.call(pipe, references=2), dense)
    assert torch.is_grad_enabled()
