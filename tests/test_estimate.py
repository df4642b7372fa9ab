"""Estimates against real tiny runs, and against published numbers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.errors import BudgetError, ConfigError, UnsupportedModelError
from sparse_ref_attn.estimation import at_share, estimate
from sparse_ref_attn.estimation.planned import PlannedRun
from sparse_ref_attn.eval.methods import methods
from sparse_ref_attn.models import adapter_for, named_model
from sparse_ref_attn.models.pipelines import edit_facts_named
from sparse_ref_attn.selection import Reducer
from sparse_ref_attn.types import Reference, TokenLayout
from tests.pipelines import CASES

ONE = [(1024, 1024)]
published = cache(named_model)


@pytest.mark.parametrize(("kept", "ratio"), [(2048, 1.41), (1024, 1.74), (600, 1.92), (512, 1.96), (256, 2.08)])
def test_published_ratios_of_a_kontext_step(kept, ratio):
    e = estimate(published("kontext"), references=ONE, config=sra.SparseRef(select="grid", budget=kept), steps=1)
    assert e.dense.total / 1e12 == pytest.approx(165.46, abs=0.005)
    assert round(e.flop_ratio, 2) == ratio


def test_recast_keeps_654_tokens_on_average_with_its_profiling_step():
    e = estimate(published("kontext"), "recast", references=ONE)
    assert round(e.mean_tokens) == 654
    assert round((sum(e.tokens) - 4096 + 256) / 28) == 517
    assert e.kinds == ("profile",) + ("sparse",) * 27
    bound = 28 * 165.46e12 / (165.46e12 + 27 * 165.46e12 / 1.96)
    assert 0.95 * bound < e.flop_ratio < bound


CONFIGS = {
    "recast": sra.ReCAST(task="subject"),
    "late probes": sra.SparseRef(select=sra.AttentionMass(blocks="all", steps=(0, 2), query_stride=3), budget=0.25),
    "self": sra.SparseRef(select=sra.SelfAttention(), budget=sra.Linear(0.1, 0.9)),
    "floors and multiple": sra.SparseRef(
        select="random", budget=sra.Constant(0.2, per="all"), floor=0.1, multiple=16, weights=(1.0,)
    ),
    "from a block": sra.SparseRef(select="mass", budget=sra.Linear(0.1, 0.9), from_block=1),
    "in flight": sra.SparseRef(select="mass", budget=sra.Linear(0.1, 0.9), profile="in_flight"),
    "in flight, from a block": sra.SparseRef(
        select=sra.AttentionMass(blocks=(0,), query_stride=3), profile="in_flight", from_block=1
    ),
    "in flight, keep all": sra.SparseRef(select="mass", budget=1.0, profile="in_flight"),
    "keep all": sra.SparseRef(select="grid", budget=1.0),
    "tiles": sra.SparseRef("mass", sra.Linear(0.1, 0.5), execute=sra.Cache(per="tile", tile=3, cell=3)),
    "tiles, no means": sra.SparseRef(
        sra.AttentionMass("all", steps=(0, 1)), 0.25, execute=sra.Cache(per="tile", rest=None, refresh=sra.Never())
    ),
    "tiles, keep all": sra.SparseRef("mass", 1.0, execute=sra.Cache(per="tile", refresh=sra.Every(2))),
}


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit"])
@pytest.mark.parametrize("words", CONFIGS)
def test_an_estimate_is_what_the_run_then_does(name, words):
    """Each configuration with guidance and without; Qwen's two calls then have prompts of two lengths, not known."""
    config, guided = CONFIGS[words], list(CONFIGS).index(words) % 2
    cfg = name == ("kontext", "klein")[guided]
    case = CASES[name]
    pipe = case.build()
    with sra.patched(pipe, config) as handle:
        case.call(pipe, steps=4, cfg=cfg)
        record, flops = handle.record, handle.flops()
    layout = record.layout
    cell = 8
    height, width = layout.references[0].grid
    e = estimate(
        pipe.transformer,
        references=[(cell * width, cell * height)],
        output=(cell * layout.generation[1], cell),
        text_tokens=layout.text,
        steps=4,
        config=config,
        calls_per_step=2 if cfg else 1,
        pixels_per_token=cell,
    )
    assert e.kinds == tuple(step.kind for step in record.steps)
    assert e.tokens == tuple(step.kept for step in record.steps)
    assert e.from_block == tuple(step.from_block for step in record.steps)
    assert e.blocks == record.blocks
    assert e.mean_tokens == pytest.approx(sum(record.mean_kept(step) for step in record.steps) / 4)
    assert e.scoring.total == pytest.approx(record.scoring_flops)
    assert e.sparse.total / 1e12 == pytest.approx(flops.sparse_tflop)
    assert e.dense.total / 1e12 == pytest.approx(flops.dense_tflop)


FAMILIES = {
    "flat": lambda keep: sra.SparseRef("edges", keep),
    "measured": lambda keep: sra.SparseRef("mass", keep),
    "rising": lambda keep: sra.SparseRef("mass", sra.Linear(keep**2, keep)),
    "ranked again": lambda keep: sra.SparseRef("mass", keep, rerank_every=3),
    "from a block": lambda keep: sra.SparseRef("edges", keep, from_block=1),
    "in flight": lambda keep: sra.SparseRef("mass", keep, profile="in_flight"),
}


@pytest.mark.parametrize("share", [1.0, 0.6, 0.4])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_share_is_the_mean_over_the_whole_run(family, share):
    model = published("klein-4b", num_layers=2, num_single_layers=2)
    e = estimate(model, references=ONE, steps=8, config=at_share(model, family, share, 8))
    assert e.mean_tokens == pytest.approx(share * 4096, abs=0.5)


def test_a_share_that_the_cache_gives():
    """Of a model's own cache the step that fills it counts; of stored references what the other steps read."""
    for name, share in (("klein-9b-kv", 1 / 3), ("klein-9b", 0.5)):
        model = published(name, num_layers=2, num_single_layers=2)
        config = at_share(model, lambda keep: sra.SparseRef("mass", keep, "cache"), 0.5, 4)
        assert config.budget.keep == pytest.approx(share, abs=1e-6)
    whole = sra.Cache(refresh=sra.Every(1))
    assert at_share(model, lambda keep: sra.SparseRef("grid", keep, execute=whole), 0.5, 4).budget.keep == 0.5


def test_the_share_of_tiles_is_of_the_steps_unless_a_budget_is_asked_for():
    model = published("kontext", num_layers=2, num_single_layers=2)
    found = {share: at_share(model, lambda keep: methods(keep, ["tiles"])["tiles"], share, 12) for share in (0.05, 0.6)}
    assert found[0.05].budget == found[0.6].budget == sra.SparseRef("mass", 1 / 8).budget
    assert [found[share].refresh for share in (0.05, 0.6)] == [sra.Every(20), sra.Every(2)]
    asked = at_share(model, lambda keep: sra.SparseRef("mass", keep, execute=sra.Cache(per="tile")), 0.3, 12)
    assert asked.budget.keep == pytest.approx(0.3)  # of the steps that read; the means are no tokens
    layout = TokenLayout(2 * 4096, 0, (0, 4096), (Reference(4096, 4096, (64, 64)),))
    planned = PlannedRun.of(asked, adapter_for(model).sites(model), layout, 12, kept_by_model=False)
    assert {step.cached for step in planned.tokens} == {0, round(0.3 * 4096) + 256}


def test_a_dense_step_above_the_share_is_an_error():
    model = published("klein-4b", num_layers=2, num_single_layers=2)
    with pytest.raises(ConfigError, match="got 25 % where they are 25 % of 4 steps"):
        at_share(model, FAMILIES["measured"], 0.25, 4)


@dataclass(frozen=True)
class FirstTokens(Reducer):
    """Stands for any rival; an estimate does not call it."""


def test_rivals_cost_what_their_tokens_cost():
    model = published("klein-4b")
    rival = estimate(model, config=sra.SparseRef(select=FirstTokens(), budget=0.1), steps=2)
    choice = estimate(model, config=sra.SparseContext(0.1), steps=2)
    assert (rival.tokens, rival.sparse) == (choice.tokens, choice.sparse)
    assert rival.tokens == (410,) * 2


def test_items_and_calls_multiply_the_work_but_scoring_happens_once_a_step():
    model = published("klein-9b")
    one, two, calls = (estimate(model, steps=2, **k) for k in ({}, {"batch": 2}, {"calls_per_step": 2}))
    assert two.dense == calls.dense == 2 * one.dense
    assert two.scoring == 2 * one.scoring
    assert calls.scoring == one.scoring
    assert calls.sparse.total == 2 * (one.sparse.total - one.scoring.total) + one.scoring.total


def test_memory_says_where_the_peak_is():
    model = published("kontext")
    plain = estimate(model, references=ONE * 4, config=sra.SparseContext(0.25), steps=2).memory
    assert plain.dense.parameters == plain.sparse.parameters == 2 * sum(p.numel() for p in model.parameters())
    joint = {"dense": 512 + 5 * 4096, "sparse": 512 + 2 * 4096}
    assert plain.sparse.activations / plain.dense.activations == pytest.approx(joint["sparse"] / joint["dense"])
    assert plain.dense_reference_kv == 2 * 57 * 4 * 4096 * 24 * 128 * 2 == 4 * plain.sparse_reference_kv
    profiled = estimate(model, references=ONE * 4, config=sra.ReCAST(task="subject"), steps=2).memory
    assert profiled.sparse == profiled.dense == plain.dense
    assert profiled.sparse_step == plain.sparse_step  # the last step keeps a quarter


def test_notes_summary_and_json():
    e = estimate(published("kontext"), config=sra.ReCAST(clock="sigma"), references=[(1024, 512), (512, 512)])
    assert e.references == (2048, 1024)
    assert "without the guard" in e.notes[0]
    assert "uniform clock" in e.notes[1]
    text = e.summary()
    for part in (f"{e.flop_ratio:.2f}", f"{e.mean_tokens:.0f} of 3072", "2048 + 1024", "1 profiling", *e.notes):
        assert part in text
    data = json.loads(json.dumps(e.to_dict()))
    assert data["tokens"] == list(e.tokens)
    assert data["flop_ratio"] == e.flop_ratio
    assert data["sparse"]["matmul"] == e.sparse.matmul
    assert data["memory"]["dense"]["parameters"] == e.memory.dense.parameters


def test_the_guard_alone_costs_a_profiling_step():
    e = estimate(published("klein-4b"), config=sra.SparseContext(0.1, guard=UniformGuard()), steps=3)
    assert e.kinds == ("profile", "sparse", "sparse")
    assert e.scoring.total > 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"config": sra.SparseRef(budget=sra.TopP(0.8))}, ConfigError, "known before the run"),
        ({"config": sra.SparseRef(budget=sra.TopP(0.8).piecewise(2))}, ConfigError, "known before the run"),
        ({"config": sra.SparseRef(select="grid", budget=5000)}, BudgetError, "4096 tokens"),
        ({"config": [0.5]}, ConfigError, "config must be a SparseRef (ReCAST"),
        ({"config": 1.5}, ConfigError, "keep must be a number of tokens"),
        ({"config": "recats"}, ConfigError, "got 'recats'; did you mean 'recast'?"),
        ({"config": sra.SparseRef(select=sra.AttentionMass(steps=(9,)))}, ConfigError, "within the run's 4 steps"),
        ({"config": sra.SparseRef("grid", from_block=2)}, ConfigError, "below the model's 2 blocks, got 2"),
        ({"config": sra.ReCAST(profile="in_flight", profile_blocks=2)}, ConfigError, "before the last of the model's"),
        ({"references": []}, ConfigError, "at least one reference"),
        ({"references": [(1024, 8)]}, ConfigError, "size of reference 0"),
        ({"references": [1024]}, ConfigError, "size of reference 0"),
        ({"output": (0, 1024)}, ConfigError, "size of output"),
        ({"output": (1000, 1024)}, ConfigError, "size of output must be multiples of 16 pixels, got 1000 x 1024"),
        ({"steps": 0}, ConfigError, "steps must be an int"),
        ({"batch": 1.5}, ConfigError, "batch must be an int"),
        ({"text_tokens": -1}, ConfigError, "text_tokens must be an int"),
    ],
)
def test_bad_input_is_said_in_words(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        estimate(published("klein-4b", num_layers=1, num_single_layers=1), **({"steps": 4} | arguments))


def test_a_pipeline_says_what_it_takes_and_how_many_steps_it_makes():
    pipe = CASES["kontext"].build()
    e = estimate(pipe, "sparse-context", references=[(64, 64)], output=(64, 64), text_tokens=32)
    cell = 2 * pipe.vae_scale_factor
    assert (len(e.kinds), e.references) == (28, ((64 // cell) ** 2,))
    assert e == estimate(
        pipe.transformer, sra.SparseContext(), references=[(64, 64)], output=(64, 64), text_tokens=32,
        pixels_per_token=cell,
    )  # fmt: skip
    assert estimate(pipe).references == (1024**2 // cell**2,)
    with pytest.raises(ConfigError, match="FluxKontextPipeline takes one reference image, got 3"):
        estimate(pipe, references=ONE * 3)
    klein = CASES["klein_kv"].build()
    assert len(estimate(klein, 0.25, references=ONE * 3).kinds) == 4
    with pytest.raises(UnsupportedModelError, match="a pipeline with a transformer"):
        estimate(1)


@pytest.mark.parametrize(
    ("name", "distilled", "steps"),
    [
        ("FluxKontextPipeline", None, 28),
        ("Flux2KleinPipeline", True, 4),
        ("Flux2KleinPipeline", False, 50),
        ("Flux2KleinKVPipeline", None, 4),
    ],
)
def test_steps_of_a_pipeline(name, distilled, steps):
    assert edit_facts_named(name).steps(distilled) == steps


def test_an_unsupported_model_is_named():
    with pytest.raises(UnsupportedModelError, match=r"Linear"):
        estimate(torch.nn.Linear(2, 2))


def test_references_of_another_type():
    with pytest.raises(ConfigError, match=r"references must be a list of \(width, height\) in pixels, got 512"):
        sra.estimate(published("klein-4b", num_layers=1), references=512, steps=2)
