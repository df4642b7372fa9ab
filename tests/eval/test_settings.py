"""What a user chooses: its words, its code, and its work, held against runs whose work is counted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from sparse_ref_attn.errors import ConfigError, IncompatibleError
from sparse_ref_attn.eval import settings as module
from sparse_ref_attn.eval.counted import counted_work
from sparse_ref_attn.eval.methods import METHODS, methods
from sparse_ref_attn.eval.rival_settings import rival_setting
from sparse_ref_attn.eval.settings import Setting
from sparse_ref_attn.eval.step_caches import StepCache, step_cached
from sparse_ref_attn.eval.work import flop_ratio
from sparse_ref_attn.source import source
from sparse_ref_attn.vocabulary import COMBINED, RIVALS
from tests.pipelines import CASES

ONCE = sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Never()))
OTHERS = [
    sra.ReCAST(),
    sra.SparseRef("mass", 300, seed=3, multiple=16),
    sra.SparseRef(sra.Edges(sigma=1.0), schedules.Pieces((1.0, 0.25), at=(0.5,)), execute=sra.Tokens(from_block=1)),
    sra.SparseRef("mass", 0.25, profile="in_flight"),
    sra.SparseRef(sra.Mix(((sra.AttentionMass(), 0.5), (sra.Grid(), 0.5))), schedules.Linear(0.1, 0.4)),
    sra.SparseRef("mass", 1 / 16, execute=sra.Cache(per="tile", rest=None, refresh=sra.At((0, 1, 1 / 3)))),
]


@pytest.mark.parametrize("config", [*methods(0.25).values(), *OTHERS], ids=lambda config: config.describe()[:40])
def test_the_code_makes_the_configuration(config: sra.SparseRef) -> None:
    assert eval(source(config), {"sra": sra}) == config
    assert source(config) in Setting(4, config).code


def test_names_tell_settings_apart() -> None:
    configs = [None, *methods(0.25).values(), *OTHERS]
    names = [Setting(steps, config).name for steps in (None, 4) for config in configs]
    assert len(set(names)) == len(names)
    assert Setting().code == ""
    with pytest.raises(ConfigError, match="steps must be an int of at least 1, or None, got 0"):
        Setting(0)


@pytest.mark.parametrize("kind", ["TaylorSeer", "TaylorSeer lite"])
@pytest.mark.parametrize("config", [None, ONCE, sra.SparseRef("mass", 0.5)], ids=["dense", "once", "mass"])
def test_the_work_beside_a_forecast_is_what_runs(
    kind: str, config: sra.SparseRef | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that are forecast, and what is left of them, are those of diffusers' own cache."""
    pipe, steps, size = CASES["klein"].build(layers=3), 9, 64

    def call() -> Any:
        return CASES["klein"].call(pipe, steps=steps, side=size, sizes=((size, size),))

    with counted_work(pipe.transformer) as dense:
        call()
    setting = Setting(None, config, StepCache(kind, every=3))
    patch = sra.patched(pipe, config or sra.SparseRef("grid", 1.0))
    with step_cached(pipe, setting.step_cache), patch as handle, counted_work(pipe.transformer) as work:
        call()
    counted = dense().total / (work().total + handle.record.scoring_flops)
    monkeypatch.setattr(module, "meta_transformer", lambda name: pipe.transformer)
    monkeypatch.setattr(module, "SIDE", 2 * size)  # its tokens have 8 pixels, those of published models 16
    layout = handle.record.layout
    monkeypatch.setattr(module, "estimate_of", partial(module.estimate_of, text_tokens=layout.text))
    for cached in (module._published, module._shapes):
        monkeypatch.setattr(module, cached.__name__, cached.__wrapped__)  # nothing of the tiny model stays behind
    found = module._flop_ratio.__wrapped__(setting, steps, "tiny", 1)
    assert found == pytest.approx(counted, rel=0.01 if kind == "TaylorSeer lite" else 1e-6)  # the output layer
    assert counted > 1


def test_a_step_cache_leaves_the_pipeline_as_it_was() -> None:
    """Also cache-dit, which changes the model's forward and its lists of blocks."""
    case = CASES["kontext"]
    pipe = case.build(layers=3)
    dense = case.call(pipe, steps=5)
    for cache in (StepCache("TaylorSeer"), StepCache("FirstBlockCache", threshold=9.0), StepCache("cache-dit")):
        with step_cached(pipe, cache):
            other = case.call(pipe, steps=5)
        assert (case.call(pipe, steps=5) == dense).all(), cache.name
        assert cache.kind == "cache-dit" or not (other == dense).all(), cache.name


def test_a_model_that_allows_no_step_cache_is_named() -> None:
    class Pipe:
        transformer = sra.PlainAdapter  # no module at all: it has no enable_cache

    cached = step_cached(Pipe, StepCache("TaylorSeer"))
    with pytest.raises(IncompatibleError, match="needs a model of diffusers with enable_cache, which type has not"):
        cached.__enter__()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "TeaCache"}, "a step cache must be one of TaylorSeer, "),
        ({"kind": "TaylorSeer", "every": 1}, "every must be an int of at least 2, got 1"),
        ({"kind": "TaylorSeer", "threshold": 0.1}, "has an interval, every, and no threshold"),
        ({"kind": "FirstBlockCache", "every": 2}, "decides at each step by its threshold, got every=2"),
        ({"kind": "cache-dit", "threshold": 0}, "threshold must be a finite number above 0, got 0"),
    ],
)
def test_settings_of_step_caches_that_make_no_sense(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StepCache(**given)


def test_rivals_by_name() -> None:
    found = {
        name: rival_setting(name, 0.25, 12, lambda method, steps: methods(0.25, [method], steps=steps)[method])
        for name in (*RIVALS, *COMBINED)
    }
    assert found["fewer steps"] == Setting(3)
    assert found["FirstBlockCache"].step_cache.threshold == 0.4
    assert found["cache + fewer steps"].steps == 6
    assert isinstance(found["tiles + TaylorSeer"].config.execute.refresh, sra.Never)
    assert set(METHODS).isdisjoint(found)
    with pytest.raises(ConfigError, match="must compute some steps and not all, got the share 1"):
        rival_setting("TaylorSeer", 1.0, 12, lambda method, steps: ONCE)
    assert flop_ratio("cache + fewer steps", 0.25, 12) > 2 * flop_ratio("cache", 0.5, 12) / 1.6
    with pytest.raises(ConfigError, match="decides while it runs"):
        flop_ratio("FirstBlockCache", 0.25, 12)
