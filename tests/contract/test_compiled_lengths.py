"""Blocks compiled for one length each: what has more lengths than torch compiles is refused beforehand, in words.

Torch's limit is 8; here it is 2 or 1, and most models have one single-stream block: a graph takes a second to compile,
or a moment where the block does next to nothing, which is all the same to counting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_flux2
from torch import Tensor

import sparse_ref_attn as sra
from tests.contract.test_compile import fresh_compiler  # noqa: F401
from tests.pictures import picture
from tests.pipelines import CASES
from tests.training.batches import Batch, build, lora

STATIC: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": "eager"}
RISING = sra.Linear(0.1, 0.9)
KLEIN = {"text_encoder_out_layers": (1, 2, 3)}  # of the tiny text encoder
GRID = sra.SparseRef("grid", RISING)


@pytest.fixture(autouse=True)
def _two_graphs(fresh_compiler: None) -> Iterator[None]:  # noqa: F811
    with torch._dynamo.config.patch(recompile_limit=2):
        yield


def compiled(name: str, layers: int = 0, single: int = 1) -> Any:
    """One block, or one of each kind, which have graphs of their own."""
    pipe = CASES[name].build(layers=layers, single=single)
    pipe.transformer.compile_repeated_blocks(**STATIC)
    return pipe


class Flux2SingleTransformerBlock(transformer_flux2.Flux2SingleTransformerBlock):
    """Has the weights, and the name by which diffusers finds what it compiles; attends to nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.norm(hidden_states)


def light(heads: int = 2, **options: Any) -> Any:
    """Klein with one block that is compiled quickly; of no use where attention is measured or answered."""
    pipe = CASES["klein"].build(layers=0, heads=heads, single=1)
    pipe.transformer.single_transformer_blocks[0].__class__ = Flux2SingleTransformerBlock
    pipe.transformer.compile_repeated_blocks(**STATIC | options)
    return pipe


def blocks(config: sra.SparseRef) -> dict[str, int]:
    """One, or two where a block has another length than the one before: of two kinds, or of one."""
    return {"layers": 1} if config.from_block else {"single": 2 if config.profile == "in_flight" else 1}


@torch._dynamo.config.patch(recompile_limit=1)
@pytest.mark.parametrize(("name", "layers"), [("klein", 1), ("kontext", 0), ("qwen_edit", 1)])
def test_a_budget_with_more_lengths_than_torch_compiles(name: str, layers: int) -> None:
    """It died at torch's recompile limit in the middle of the run. Each kind of block has a limit of its own."""
    case, pipe = CASES[name], compiled(name, layers=layers)
    sra.patch(pipe, GRID)
    refused = r"at most 1 sequence lengths .* got 2 new .*Linear.*piecewise.*multiple.*dynamic=None or True"
    with pytest.raises(sra.IncompatibleError, match=refused):
        case.call(pipe, steps=2)
    case.call(pipe, steps=1)
    case.call(pipe, steps=1, seed=1)


@pytest.mark.parametrize(
    "configs",
    [
        [sra.SparseRef("grid", sra.Linear(0.1, 0.6), multiple=64)],
        [sra.SparseRef("grid", RISING.piecewise(2), from_block=1)],
        [sra.SparseRef("mass", sra.TopP(0.5))],
        [
            sra.SparseRef("mass", RISING.piecewise(2), profile="in_flight"),
            sra.SparseRef("mass", RISING.piecewise(2)),
            sra.SparseRef("mass", RISING.piecewise(2), rerank_every=3),
        ],
    ],
    ids=["multiple", "from_block", "top_p", "pieces"],
)
def test_few_lengths_run(configs: list[sra.SparseRef]) -> None:
    """One after the other, of the same two lengths: none has a third."""
    pipe = compiled("klein", **blocks(configs[0]))
    for config in configs:
        handle = sra.patch(pipe, config)
        for seed in (0, 1):
            assert np.isfinite(CASES["klein"].call(pipe, steps=6, seed=seed)).all()
            assert [step.index for step in handle.record.steps] == list(range(6))


@pytest.mark.parametrize(
    "config",
    [
        sra.SparseRef("mass", RISING),
        sra.SparseRef("mass", RISING, profile="in_flight"),
        sra.SparseRef("mass", RISING, rerank_every=4),
        sra.SparseRef("grid", RISING, from_block=1),
        sra.SparseRef("grid", RISING.piecewise(4)),
    ],
    ids=["mass", "in_flight", "rerank", "from_block", "pieces"],
)
def test_many_lengths_are_refused_before_the_first_layer(config: sra.SparseRef) -> None:
    pipe, ran = compiled("klein", **blocks(config)), []
    pipe.transformer.x_embedder.register_forward_hook(lambda *call: ran.append(call))
    sra.patch(pipe, config)
    with pytest.raises(sra.IncompatibleError, match=r"at most 2 sequence lengths"):
        CASES["klein"].call(pipe, steps=8)
    assert not ran


def test_a_whole_call_of_a_measured_step_is_a_length_of_its_own() -> None:
    """The second branch of guidance is not measured, and runs compiled."""
    pipe = compiled("klein")
    sra.patch(pipe, sra.SparseRef("mass", RISING.piecewise(2)))
    with pytest.raises(sra.IncompatibleError, match=r"0 of 2 graphs are taken.*got 3 new"):
        CASES["klein"].call(pipe, steps=6, cfg=True)


@pytest.mark.parametrize("options", [{"dynamic": True}, {"fullgraph": False}], ids=str)
def test_other_compilations_are_not_refused(options: dict[str, Any]) -> None:
    """Nor those of dynamic=None, which `test_compile.test_repeated_blocks` runs, and test_trainers in training."""
    pipe = light(**options)
    handle = sra.patch(pipe, GRID)
    CASES["klein"].call(pipe, steps=3)
    assert len({step.kept for step in handle.record.steps}) == 3  # more than the 2 that may be compiled


def test_without_dynamic_shapes_none_is_static() -> None:
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        pipe = light(dynamic=None)
        sra.patch(pipe, GRID)
        with pytest.raises(sra.IncompatibleError, match="at most 2"):
            CASES["klein"].call(pipe, steps=4)


def test_the_limit_is_torchs_at_the_time() -> None:
    pipe = light()
    sra.patch(pipe, GRID)
    for limit in (3, 1):
        refused = pytest.raises(sra.IncompatibleError, match=f"at most {limit} .*got {limit + 1} new")
        with torch._dynamo.config.patch(recompile_limit=limit), refused:
            CASES["klein"].call(pipe, steps=limit + 1)


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_limit_of_the_compilation_alone() -> None:
    try:
        pipe = light(recompile_limit=2, isolate_recompiles=True)
    except TypeError:
        pytest.skip("this torch has no limit of one compilation")
    sra.patch(pipe, GRID)
    CASES["klein"].call(pipe, steps=2)
    with pytest.raises(sra.IncompatibleError, match=r"at most 2 .*got 1 new"):
        CASES["klein"].call(pipe, steps=1, side=96)


def test_lengths_of_several_runs_add_up() -> None:
    """Other sizes, other references, another number of steps: each run alone has few enough."""
    case, pipe = CASES["klein"], light()
    sra.patch(pipe, GRID)
    for _ in range(2):
        case.call(pipe, steps=1)
        case.call(pipe, steps=1, side=96)
    for others in ({"side": 128}, {"references": 2}, {"batch": 2}, {"steps": 2}):
        with pytest.raises(sra.IncompatibleError, match=r"2 of 2 graphs are taken, .*got 1 new"):
            case.call(pipe, **{"steps": 1} | others)
    case.call(pipe, steps=1)
    torch._dynamo.reset()
    case.call(pipe, steps=1, side=128)


def test_runs_of_several_models_and_patches_add_up() -> None:
    case, one, two, wide = CASES["klein"], light(), light(), light(heads=4)
    for pipe in (one, two, wide):
        sra.patch(pipe, GRID)
    case.call(one, steps=1)
    case.call(two, steps=1)  # the same graph
    sra.patch(one, sra.SparseRef("edges", RISING))
    case.call(one, steps=1)
    with pytest.raises(sra.IncompatibleError, match=r"1 of 2 graphs are taken, .*got 2 new ones"):
        case.call(wide, steps=2)


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_whole_call_may_have_run_before_the_patch() -> None:
    case, pipe = CASES["klein"], light()
    case.call(pipe, steps=1)
    sra.patch(pipe, sra.SparseRef("grid", 1.0))
    case.call(pipe, steps=1)
    sra.patch(pipe, sra.SparseRef("grid", 0.5))
    with pytest.raises(sra.IncompatibleError, match=r"1 of 1 graphs are taken, .*got 1 new"):
        case.call(pipe, steps=1)


@torch.no_grad()
def test_an_own_loop() -> None:
    """Nobody knows the times of the steps to come, unless they are told, but what a budget gives at any time."""
    model, batch = light().transformer, Batch("klein")
    handle = sra.patch(model, GRID)
    with pytest.raises(sra.IncompatibleError, match=r"at most 2 .*got 33 new.*piecewise"):
        model(**batch.kwargs)
    handle.begin(4)
    handle.step(0)
    with pytest.raises(sra.IncompatibleError, match=r"at most 2 .*got 4 new.*piecewise"):
        model(**batch.kwargs)
    sra.patch(model, sra.SparseRef("grid", RISING.piecewise(2)))
    for t in (1.0, 0.8, 0.3):
        model(**batch.kwargs | {"timestep": torch.full((2,), t)})


def test_a_batch_runs_its_joined_calls_uncompiled() -> None:
    pipe = compiled("klein")
    images = [[picture(64, 64, 0)], [picture(96, 64, 1)]]
    done = sra.batch(pipe, ["a", "b"], images, config=GRID, num_inference_steps=5, height=64, width=64, **KLEIN)
    assert len(done.images) == 2


def test_the_last_item_of_a_batch_runs_compiled() -> None:
    pipe = light()
    images, each = [[picture(64, 64, 0)], [picture(96, 64, 1)]], [{"num_inference_steps": n} for n in (1, 8)]
    with pytest.raises(sra.BatchError, match=r"item 1 .*at most 2 sequence lengths"):
        sra.batch(pipe, ["a", "b"], images, config=GRID, each=each, height=64, width=64, **KLEIN)


def tuned(name: str, layers: int = 0, single: int = 1, **options: Any) -> Any:
    model = lora(build(name, layers=layers, single=single))
    model.compile_repeated_blocks(**STATIC | options)
    return model


@pytest.mark.parametrize(("name", "layers", "single"), [("klein", 0, 1), ("kontext", 1, 0), ("qwen_edit_plus", 1, 0)])
def test_training_on_blocks_compiled_for_one_length_each(name: str, layers: int, single: int) -> None:
    """Another length in each draw: it died within a few steps."""
    model, batch, drop = tuned(name, layers, single), Batch(name), sra.RandomDrop(keep=(0.1, 0.9))
    sra.patch_for_training(model, drop)
    got = len(drop.counts(batch.sizes))
    refused = rf"at most 2 .*got {got} new ones of RandomDrop.*one keep ratio.*dynamic=None"
    with pytest.raises(sra.IncompatibleError, match=refused):
        batch.loss(model)
    sra.patch_for_training(model, sra.RandomDrop(keep=0.5))
    for _ in range(3):
        batch.loss(model).backward()


@torch._dynamo.config.patch(recompile_limit=3)
def test_training_where_a_length_makes_several_graphs() -> None:
    """The first of two blocks has inputs without gradients, and so a graph of its own."""
    model, batch = tuned("klein", single=2), Batch("klein")
    total = sum(batch.sizes)
    sra.patch_for_training(model, sra.RandomDrop(keep=10 / total))
    batch.loss(model).backward()
    sra.patch_for_training(model, sra.RandomDrop(keep=11 / total))
    with pytest.raises(sra.IncompatibleError, match=r"at most 1 sequence lengths .*2 of 3 graphs are taken"):
        batch.loss(model)


def test_stored_references_make_two_lengths_a_size() -> None:
    """The whole one and that without reference rows, whatever is read."""
    case, pipe = CASES["klein"], compiled("klein")
    stored = sra.SparseRef("grid", sra.Linear(0.1, 0.9), execute=sra.Cache(refresh=sra.Every(2)))
    sra.patch(pipe, stored)
    for seed in (0, 1):
        case.call(pipe, steps=4, seed=seed)
    with pytest.raises(sra.IncompatibleError, match=r"at most 2 sequence lengths .*got 2 new"):
        case.call(pipe, steps=4, side=96)


@torch._dynamo.config.patch(recompile_limit=1)
def test_graphs_that_torch_forgot_are_forgotten_though_it_has_others() -> None:
    """After a reset calls without a patch compile as many again; the lengths of before have no graph."""
    case, pipe = CASES["klein"], light()
    with sra.patched(pipe, GRID):
        case.call(pipe, steps=1)
    torch._dynamo.reset()
    case.call(pipe, steps=1)
    with sra.patched(pipe, GRID), pytest.raises(sra.IncompatibleError, match=r"1 of 1 graphs are taken, .*got 1 new"):
        case.call(pipe, steps=1)
