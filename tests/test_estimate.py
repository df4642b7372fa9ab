"""Estimates against FlopCounterMode at real size on meta, against real tiny runs, and against published numbers."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.depth import DepthCut
from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.cost import StepTokens, step_flops
from sparse_ref_attn.errors import BudgetError, ConfigError, UnsupportedModelError
from sparse_ref_attn.estimation import at_share, estimate
from sparse_ref_attn.estimation.planned import PlannedRun
from sparse_ref_attn.eval.methods import methods
from sparse_ref_attn.models import adapter_for, named_model
from sparse_ref_attn.models.pipelines import edit_facts_named
from sparse_ref_attn.models.published import published_size
from sparse_ref_attn.ops.attention_mass.reference import attention_mass_reference
from sparse_ref_attn.patching.execution.depth import leaving
from sparse_ref_attn.selection import Reducer
from sparse_ref_attn.types import Reference, TokenLayout
from sparse_ref_attn.vocabulary import MODELS
from tests.pipelines import CASES

ONE = [(1024, 1024)]


def empty(*shape):
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


def call(name, model, text, generation, references):
    rows = generation + references
    inputs = {
        "hidden_states": empty(1, rows, model.config.in_channels),
        "encoder_hidden_states": empty(1, text, model.config.joint_attention_dim),
        "timestep": empty(1),
    }
    if name == "kontext":
        extra = {"pooled_projections": empty(1, 768), "guidance": empty(1)}
        model(**inputs, **extra, img_ids=empty(rows, 3), txt_ids=empty(text, 3))
    elif name.startswith("qwen"):
        with torch.device("meta"):
            model(**inputs, img_shapes=[[(1, 64, generation // 64), (1, 1, references)]])
    else:
        model(**inputs, guidance=None, img_ids=empty(rows, 4), txt_ids=empty(text, 4))


def counted(function, *args):
    """FLOPs. On meta a block of a class does the same for the same shapes, so each is run once for them and added."""
    outputs, extra = {}, []
    with torch.no_grad(), FlopCounterMode(display=False) as counter, contextlib.ExitStack() as stack:
        models = [x for x in args if isinstance(x, torch.nn.Module)]
        kinds = {type(block.module) for model in models for block in adapter_for(model).blocks(model)}

        def once(forward):
            def run(block, *given, **named):
                leaves, form = tree_flatten((given, named))
                key = type(block), str(form), *(x.shape if isinstance(x, torch.Tensor) else x for x in leaves)
                if key in outputs:
                    extra.append(outputs[key][1])
                else:
                    before = counter.get_total_flops()
                    outputs[key] = forward(block, *given, **named), counter.get_total_flops() - before
                return outputs[key][0]

            return run

        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "forward", once(kind.forward)))
        function(*args)
    return counter.get_total_flops() + sum(extra)


@pytest.mark.parametrize("name", ["kontext", "klein-9b", "qwen-image-edit-2511"])
def test_a_whole_run_is_within_one_percent_of_the_flop_counter(name):
    model = named_model(name)
    e = estimate(model, references=[(1024, 1024), (768, 1024)], steps=3, text_tokens=300)
    steps = [counted(call, name, model, 300, 4096, kept) for kept in e.tokens]
    assert e.kinds == ("profile", "sparse", "sparse")
    assert e.tokens[0] == sum(e.references) == 4096 + 3072
    heads, channels = model.config.num_attention_heads, model.config.attention_head_dim
    scored = {"kontext": 38, "klein-9b": 24, "qwen-image-edit-2511": 40}[name]
    q, k = empty(1, 4096, heads, channels), empty(1, 300 + 4096 + e.tokens[0], heads, channels)
    # the model's own attention gives the LSE: the references' own keys alone are multiplied
    scoring = scored * counted(attention_mass_reference, q, k[:, 4396:], (0, e.tokens[0]), 1.0)
    assert e.scoring.total == pytest.approx(scoring, rel=0.01)
    assert e.dense.total == pytest.approx(3 * steps[0], rel=0.01)
    assert e.sparse.total == pytest.approx(sum(steps) + scoring, rel=0.01)


def call_by_depth(name, model, kept, first):
    """One call whose references leave at block `first`."""
    adapter = adapter_for(model)
    layout = TokenLayout(2 * 4096, 300, (0, 4096), (Reference(4096, 4096, (64, 64)),))
    cut = DepthCut(layout, lambda: torch.arange(4096 + kept, device="meta"))

    def shorten(kind, block, args, kwargs):
        assert cut.arrive()
        return adapter.drop_in_block(kind, adapter.bind(block, args, kwargs), cut)

    with leaving(adapter.blocks(model)[first:], shorten):
        call(name, model, 300, 4096, 4096)


@pytest.mark.parametrize(("name", "first"), [("kontext", 30), ("klein-9b", 3), ("qwen-image-edit-2511", 20)])
def test_leaving_by_depth_is_within_one_percent_of_the_flop_counter(name, first):
    model = named_model(name)
    given = {"references": ONE, "steps": 3, "text_tokens": 300}
    dense, by_depth = counted(call, name, model, 300, 4096, 4096), counted(call_by_depth, name, model, 1024, first)
    at_input = counted(call, name, model, 300, 4096, 1024)
    assert at_input < by_depth < dense
    layout = TokenLayout(2 * 4096, 300, (0, 4096), (Reference(4096, 4096),))
    exact = step_flops(adapter_for(model).shape(model), StepTokens.of(layout, 1024, first))
    assert exact.total == by_depth
    e = estimate(model, **given, config=sra.SparseRef("grid", 0.25, from_block=first))
    assert (e.kinds, e.from_block) == (("sparse",) * 3, (first,) * 3)
    assert e.sparse.total == pytest.approx(3 * by_depth, rel=0.01)
    assert e.dense.total == pytest.approx(3 * dense, rel=0.01)
    blocks = e.blocks
    assert e.mean_tokens == pytest.approx((first * 4096 + (blocks - first) * 1024) / blocks)
    flying = estimate(model, **given, config=sra.SparseRef("mass", 0.25, profile="in_flight", profile_blocks=first))
    assert flying.kinds == ("in_flight", "sparse", "sparse")
    heads, channels = model.config.num_attention_heads, model.config.attention_head_dim
    scored = {"kontext": 11, "klein-9b": 3, "qwen-image-edit-2511": 20}[name]  # Kontext's first 11 single blocks
    q, k = empty(1, 4096, heads, channels), empty(1, 300 + 8192, heads, channels)
    scoring = scored * counted(attention_mass_reference, q, k[:, 4396:], (0, 4096), 1.0)
    assert flying.scoring.total == pytest.approx(scoring, rel=0.01)
    assert flying.sparse.total == pytest.approx(by_depth + 2 * at_input + scoring, rel=0.01)


@pytest.mark.parametrize(("kept", "ratio"), [(2048, 1.41), (1024, 1.74), (600, 1.92), (512, 1.96), (256, 2.08)])
def test_published_ratios_of_a_kontext_step(kept, ratio):
    e = estimate(named_model("kontext"), references=ONE, config=sra.SparseRef(select="grid", budget=kept), steps=1)
    assert e.dense.total / 1e12 == pytest.approx(165.46, abs=0.005)
    assert round(e.flop_ratio, 2) == ratio


def test_recast_keeps_654_tokens_on_average_with_its_profiling_step():
    e = estimate(named_model("kontext"), references=ONE)
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


# With guidance Qwen's two calls have prompts of two lengths, which an estimate does not know.
@pytest.mark.parametrize(
    ("name", "cfg"), [("kontext", False), ("kontext", True), ("klein", False), ("klein", True), ("qwen_edit", False)]
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_an_estimate_is_what_the_run_then_does(name, config, cfg):
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
    model = named_model("klein-4b", num_layers=2, num_single_layers=2)
    e = estimate(model, references=ONE, steps=8, config=at_share(model, family, share, 8))
    assert e.mean_tokens == pytest.approx(share * 4096, abs=0.5)


def test_a_share_that_the_cache_gives():
    """Of a model's own cache the step that fills it counts; of stored references what the other steps read."""
    for name, share in (("klein-9b-kv", 1 / 3), ("klein-9b", 0.5)):
        model = named_model(name, num_layers=2, num_single_layers=2)
        config = at_share(model, lambda keep: sra.SparseRef("mass", keep, "cache"), 0.5, 4)
        assert config.budget.keep == pytest.approx(share, abs=1e-6)
    whole = sra.Cache(refresh=sra.Every(1))
    assert at_share(model, lambda keep: sra.SparseRef("grid", keep, execute=whole), 0.5, 4).budget.keep == 0.5


def test_the_share_of_tiles_is_of_the_steps_unless_a_budget_is_asked_for():
    model = named_model("kontext", num_layers=2, num_single_layers=2)
    found = {share: at_share(model, lambda keep: methods(keep, ["tiles"])["tiles"], share, 12) for share in (0.05, 0.6)}
    assert found[0.05].budget == found[0.6].budget == sra.SparseRef("mass", 1 / 8).budget
    assert [found[share].refresh for share in (0.05, 0.6)] == [sra.Every(20), sra.Every(2)]
    asked = at_share(model, lambda keep: sra.SparseRef("mass", keep, execute=sra.Cache(per="tile")), 0.3, 12)
    assert asked.budget.keep == pytest.approx(0.3)  # of the steps that read; the means are no tokens
    layout = TokenLayout(2 * 4096, 0, (0, 4096), (Reference(4096, 4096, (64, 64)),))
    planned = PlannedRun.of(asked, adapter_for(model).sites(model), layout, 12, kept_by_model=False)
    assert {step.cached for step in planned.tokens} == {0, round(0.3 * 4096) + 256}


def test_a_dense_step_above_the_share_is_an_error():
    model = named_model("klein-4b", num_layers=2, num_single_layers=2)
    with pytest.raises(ConfigError, match="got 25 % where they are 25 % of 4 steps"):
        at_share(model, FAMILIES["measured"], 0.25, 4)


@dataclass(frozen=True)
class FirstTokens(Reducer):
    """Stands for any rival; an estimate does not call it."""


def test_rivals_cost_what_their_tokens_cost():
    model = named_model("klein-4b")
    rival = estimate(model, config=sra.SparseRef(select=FirstTokens(), budget=0.1), steps=2)
    choice = estimate(model, config=sra.SparseContext(0.1), steps=2)
    assert (rival.tokens, rival.sparse) == (choice.tokens, choice.sparse)
    assert rival.tokens == (410,) * 2


def test_items_and_calls_multiply_the_work_but_scoring_happens_once_a_step():
    model = named_model("klein-9b")
    one, two, calls = (estimate(model, steps=2, **k) for k in ({}, {"batch": 2}, {"calls_per_step": 2}))
    assert two.dense == calls.dense == 2 * one.dense
    assert two.scoring == 2 * one.scoring
    assert calls.scoring == one.scoring
    assert calls.sparse.total == 2 * (one.sparse.total - one.scoring.total) + one.scoring.total


def test_memory_says_where_the_peak_is():
    model = named_model("kontext")
    plain = estimate(model, references=ONE * 4, config=sra.SparseContext(0.25), steps=2).memory
    assert plain.dense.parameters == plain.sparse.parameters == 2 * sum(p.numel() for p in model.parameters())
    joint = {"dense": 512 + 5 * 4096, "sparse": 512 + 2 * 4096}
    assert plain.sparse.activations / plain.dense.activations == pytest.approx(joint["sparse"] / joint["dense"])
    assert plain.dense_reference_kv == 2 * 57 * 4 * 4096 * 24 * 128 * 2 == 4 * plain.sparse_reference_kv
    profiled = estimate(model, references=ONE * 4, config=sra.ReCAST(task="subject"), steps=2).memory
    assert profiled.sparse == profiled.dense == plain.dense
    assert profiled.sparse_step == plain.sparse_step  # the last step keeps a quarter


def test_notes_summary_and_json():
    e = estimate(named_model("kontext"), config=sra.ReCAST(clock="sigma"), references=[(1024, 512), (512, 512)])
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
    e = estimate(named_model("klein-4b"), config=sra.SparseContext(0.1, guard=UniformGuard()), steps=3)
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
        estimate(named_model("klein-4b", num_layers=1, num_single_layers=1), **({"steps": 4} | arguments))


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


@pytest.mark.parametrize("name", MODELS)
def test_named_models_have_their_published_size(name):
    parameters = list(named_model(name).parameters())
    assert sum(p.numel() for p in parameters) / 1e9 == pytest.approx(published_size(name).billions, abs=0.1)
    assert {(p.device.type, p.dtype, p.requires_grad) for p in parameters} == {("meta", torch.bfloat16, False)}


def test_named_models_are_found_by_name_and_cut_by_field():
    assert named_model("qwen-image-edit-2511").config.zero_cond_t
    assert len(named_model("klein-9b", num_layers=2).transformer_blocks) == 2
    with pytest.raises(ConfigError, match="kontext, flux2-dev"):
        named_model("flux9")
    with pytest.raises(ConfigError, match="width"):
        named_model("kontext", width=3)


def test_references_of_another_type():
    with pytest.raises(ConfigError, match=r"references must be a list of \(width, height\) in pixels, got 512"):
        sra.estimate(named_model("klein-4b", num_layers=1), references=512, steps=2)


# --- reference cache


@pytest.mark.parametrize(
    ("execute", "keep", "ratio"),
    [("tokens", 0.25, 3.25), ("cache", 0.25, 2.83), ("both", 0.25, 5.14), ("cache", 1.0, 2.53), ("both", 0.1, 6.13)],
)
def test_klein_with_four_references(execute, keep, ratio):
    """Against plain Klein. The extract step's references look at themselves alone, which a joint step's do not."""
    e = estimate(
        named_model("klein-9b-kv"), references=[(1024, 1024)] * 4, steps=4, config=sra.SparseRef("edges", keep, execute)
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
    model, call = named_model("klein-9b-kv"), {"references": [(1024, 1024)], "steps": 9}
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
