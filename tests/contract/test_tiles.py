"""The patch contract of stored references that tiles read: nothing stale, nothing left behind, nothing silent."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.errors import ConfigError, IncompatibleError
from sparse_ref_attn.reference_cache import TiledCache
from tests.adapters.test_masks_plain import Masked
from tests.contract import patched
from tests.contract.state import kinds
from tests.contract.test_offload import by_model, sequential
from tests.pipelines import CASES
from tests.test_batch import Items, record

STEPS = 4
TILES = sra.SparseRef("mass", 0.25, execute=sra.Cache(per="tile", tile=3, cell=3, refresh=sra.At((2,))))
ONCE = sra.SparseRef("mass", 0.25, execute=sra.Cache(per="tile", tile=3, cell=3, refresh=sra.Never()))
models = pytest.mark.parametrize("name", ["kontext", "klein", "klein_kv", "qwen_edit_plus"])


@models
def test_a_planted_stale_store_is_never_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken-off runs, another prompt, another seed: whatever they stored is NaN when the next one stores."""
    case, pipe, alive = CASES[name], CASES[name].build(), []
    takes = "adopt" if name == "klein_kv" else "store"
    take = getattr(TiledCache, takes)

    def spoiling(self: TiledCache, layer: int, k: torch.Tensor, v: torch.Tensor) -> Any:
        for each in alive:
            if each is not self:
                for pair in (*each._rows.values(), *each._means.values()):
                    for x in pair:
                        x.fill_(torch.nan)
        if self not in alive:
            alive.append(self)
        return take(self, layer, k, v)

    monkeypatch.setattr(TiledCache, takes, spoiling)

    def stop(pipe: Any, step: int, time: Any, values: dict) -> dict:
        raise KeyboardInterrupt

    with sra.patched(pipe, TILES):
        for seed in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                case.call(pipe, steps=STEPS, callback=stop)
            assert np.isfinite(case.call(pipe, steps=STEPS, seed=seed, first=7 * seed)).all()
    assert len(alive) == 4


@pytest.mark.parametrize(
    ("name", "offload"),
    [("kontext", sequential), ("klein", by_model), ("klein_kv", sequential), ("qwen_edit_plus", by_model)],
)
def test_through_offload(name: str, offload: Any) -> None:
    case, pipe = CASES[name], CASES[name].build()
    wanted = patched.picture(case, TILES, steps=STEPS, seed=0, first=0)
    offload(pipe)
    with sra.patched(pipe, TILES):
        assert np.array_equal(case.call(pipe, steps=STEPS), wanted)


@models
def test_in_a_batch_each_item_has_its_own(name: str) -> None:
    case, pipe = CASES[name], CASES[name].build()
    items = Items(case, pipe)
    want, steps = items.alone(TILES)
    done = items.together(TILES)
    for got, alone in zip(done.images, want, strict=True):
        assert np.array_equal(got, alone)
    assert [record(h) if images else [] for h, images in zip(done.handles, items.images, strict=True)] == steps


def test_a_step_cache_goes_with_references_that_are_computed_once() -> None:
    case, pipe = CASES["qwen_edit_plus"], CASES["qwen_edit_plus"].build(layers=3)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    with sra.patched(pipe, ONCE) as handle:
        assert np.isfinite(case.call(pipe, steps=STEPS)).all()
        assert kinds(handle) == ["profile", "cached", "cached", "cached"]


def test_strength_that_starts_late_and_autocast() -> None:
    case, pipe = CASES["kontext_inpaint"], CASES["kontext_inpaint"].build()
    with sra.patched(pipe, ONCE) as handle:
        plain = case.call(pipe, steps=6, strength=0.5)
        assert kinds(handle) == ["profile", "cached", "cached"]
        with torch.autocast("cpu", torch.bfloat16):
            cast = case.call(pipe, steps=6, strength=0.5)
        assert 0 < np.abs(cast - plain).mean() < 0.1
        (rows, _), tiles = next(iter(handle.record.tiles.reads.values())), handle.record.tiles
        assert (tiles.shape, rows.dtype) == ((3, 3), torch.int32)


def test_a_model_without_grids_is_refused_before_anything_runs() -> None:
    model, x, text = Masked().eval(), torch.randn(2, 112, 32), torch.randn(2, 12, 32)
    found = (((0, 64), (sra.Reference(64, 48, (6, 8)),)), ((0, 64), (sra.Reference(64, 48),)))
    ran: list[Any] = []
    model.qkv[0].register_forward_pre_hook(lambda *args: ran.append(args))
    cases = (
        (found[0], None, r'per="tile" needs the height and width in tokens of the 64 generation tokens, got None'),
        (found[0], (5, 5), r"of the 64 generation tokens, got \(5, 5\) from the plain adapter"),
        (found[1], (8, 8), r'rest="means" needs the height and width in tokens of each reference, got \(None,\)'),
    )
    for where, grid, words in cases:
        adapter = sra.PlainAdapter(
            "x", lambda kwargs, where=where: where, text="text", attention=["single"] * 2,
            grid=lambda kwargs, grid=grid: grid,
        )  # fmt: skip
        with sra.patched(model, ONCE, adapter=adapter) as handle:
            handle.begin(steps=2)
            with pytest.raises(IncompatibleError, match=words):
                model(x=x, text=text)
    assert not ran
    without = sra.SparseRef("mass", 0.25, execute=sra.Cache(per="tile", rest=None, refresh=sra.Never()))
    with sra.patched(model, without, adapter=adapter) as handle:
        handle.begin(steps=2)
        model(x=x, text=text)
        handle.step(1)
        assert torch.isfinite(model(x=x, text=text)).all()
        assert handle.record.steps[1].means == 0


def test_what_tiles_hold_is_freed_and_counted() -> None:
    case, pipe = CASES["kontext"], CASES["kontext"].build()
    with sra.patched(pipe, ONCE) as handle:
        case.call(pipe, steps=3)
        store, run = handle._generations.store, handle._generations.run
        assert [branch.held for branch in store._branches[run]] == [None]
        tokens, layers, row = 96, 4, 2 * 2 * 16 * 4
        tiles, cells, read = 10, 4 * 3, 24  # 3 x 3 of the generation and the text; of 12 x 8 tokens; a quarter
        cells = -(-handle.record.layout.references[0].grid[0] // 3) * -(
            -handle.record.layout.references[0].grid[1] // 3
        )
        rows, lists = layers * (tokens + cells) * row, layers * tiles * 4 * (2 * read + cells)
        assert [step.cache_bytes for step in handle.record.steps][1:] == [rows + lists] * 2
        assert handle.record.dense_cache_bytes == layers * tokens * row


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sra.Cache(per="layer"), 'per must be "run" or "tile", got \'layer\''),
        (lambda: sra.Cache(per="tile", tile=0), "tile must be the side of a square of tokens, an int of at least 1"),
        (lambda: sra.Cache(per="tile", cell=2.0), "cell must be the side of a square of tokens"),
        (lambda: sra.Cache(per="tile", rest="mean"), 'rest must be "means", "weighted" or None, got \'mean\''),
        (lambda: sra.Cache(tile=3), 'tile must come with per="tile", got per="run"'),
        (lambda: sra.Cache(per="tile", layers=(1.0,)), 'per="tile" goes without layers'),
        (lambda: sra.Cache(per="tile", rerank_every=2), 'per="tile" goes without rerank_every'),
        (lambda: sra.Cache("kept", per="tile"), 'per="tile" must compute every reference token in full steps'),
        (lambda: sra.SparseRef("edges", 0.5, "cache", per="tile"), "select must be AttentionMass"),
        (lambda: sra.SparseRef(sra.AttentionMass(query_stride=2), 0.5, "cache", per="tile"), "without query_stride"),
        (lambda: sra.SparseRef("mass", 0.5, per="tile"), "per must come with execute=\"cache\", got it with 'tokens'"),
        (lambda: sra.SparseRef("mass", 0.5, "cache", per="tiel"), "did you mean 'tile'"),
    ],
)
def test_settings_without_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_configuration_travels_through_json() -> None:
    for more in ({}, {"rest": None}, {"tile": 8, "cell": 2}):
        setting = sra.SparseRef("mass", 0.5, execute=sra.Cache(per="tile", **more))
        assert sra.SparseRef.from_json(setting.to_json()) == setting
    assert sra.SparseRef("mass", 0.5, "cache", per="tile", rest="none").execute == sra.Cache(per="tile", rest=None)
