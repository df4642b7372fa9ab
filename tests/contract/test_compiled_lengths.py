"""Blocks compiled for one length each: what has more lengths than torch compiles is refused beforehand, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sparse_ref_attn as sra
from tests.pipelines import CASES
from tests.training.batches import Batch, build, lora

STATIC: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": "eager"}
REFUSED = r"at most 8 sequence lengths .* got {} .*piecewise.*multiple.*dynamic=None or True"


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(name: str, **options: Any) -> Any:
    pipe = CASES[name].build()
    pipe.transformer.compile_repeated_blocks(**STATIC | options)
    return pipe


@pytest.mark.parametrize("name", ["klein", "kontext", "qwen_edit"])
def test_a_budget_with_more_lengths_than_torch_compiles(name: str) -> None:
    """It died at torch's recompile limit in its ninth step."""
    case, pipe = CASES[name], compiled(name)
    sra.patch(pipe, sra.SparseRef("grid", sra.Linear(0.1, 0.9)))
    with pytest.raises(sra.IncompatibleError, match=REFUSED.format(14)):
        case.call(pipe, steps=14)
    case.call(pipe, steps=8)
    case.call(pipe, steps=8, seed=1)


@pytest.mark.parametrize(
    "config",
    [
        sra.SparseRef("grid", sra.Linear(0.1, 0.9).piecewise(3)),
        sra.SparseRef("grid", sra.Linear(0.1, 0.9), multiple=16),
        sra.SparseRef("mass", sra.Linear(0.1, 0.9).piecewise(3)),
        sra.SparseRef("mass", sra.Linear(0.1, 0.9).piecewise(3), profile="in_flight"),
        sra.SparseRef("mass", 0.25, rerank_every=2),
        sra.SparseRef("grid", sra.Linear(0.1, 0.9).piecewise(7), from_block=1),
        sra.SparseRef("mass", sra.TopP(0.5)),
    ],
    ids=["pieces", "multiple", "mass", "in_flight", "rerank", "from_block", "top_p"],
)
def test_few_lengths_run(config: sra.SparseRef) -> None:
    pipe = compiled("klein")
    sra.patch(pipe, config)
    CASES["klein"].call(pipe, steps=14)
    CASES["klein"].call(pipe, steps=14, seed=1, cfg=True)


@pytest.mark.parametrize("config", [
    sra.SparseRef("mass", sra.Linear(0.1, 0.9)),
    sra.SparseRef("mass", sra.Linear(0.1, 0.9), profile="in_flight"),
    sra.SparseRef("mass", sra.Linear(0.1, 0.9), rerank_every=3),
    sra.SparseRef("grid", sra.Linear(0.1, 0.9), from_block=1),
], ids=["mass", "in_flight", "rerank", "from_block"])  # fmt: skip
def test_many_lengths_are_refused_before_the_first_block(config: sra.SparseRef) -> None:
    pipe, ran = compiled("klein"), []
    pipe.transformer.x_embedder.register_forward_hook(lambda *call: ran.append(call))
    sra.patch(pipe, config)
    with pytest.raises(sra.IncompatibleError, match=r"at most 8 sequence lengths"):
        CASES["klein"].call(pipe, steps=14)
    assert not ran


@pytest.mark.parametrize("options", [{"dynamic": True}, {"dynamic": None}, {"fullgraph": False}], ids=str)
def test_other_compilations_are_not_refused(options: dict[str, Any]) -> None:
    pipe = compiled("klein", **options)
    sra.patch(pipe, sra.SparseRef("grid", sra.Linear(0.1, 0.9)))
    CASES["klein"].call(pipe, steps=14)


def test_the_limit_is_torchs_at_the_time() -> None:
    case, pipe = CASES["klein"], compiled("klein")
    sra.patch(pipe, sra.SparseRef("grid", sra.Linear(0.1, 0.9)))
    with torch._dynamo.config.patch(recompile_limit=14):
        case.call(pipe, steps=14)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=3), pytest.raises(sra.IncompatibleError, match="at most 3"):
        case.call(pipe, steps=4)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        pipe = compiled("klein", dynamic=None)
        sra.patch(pipe, sra.SparseRef("grid", sra.Linear(0.1, 0.9)))
        with pytest.raises(sra.IncompatibleError, match="at most 8"):
            case.call(pipe, steps=14)


def test_a_limit_of_the_compilation_alone() -> None:
    case, pipe = CASES["klein"], CASES["klein"].build()
    try:
        pipe.transformer.compile_repeated_blocks(**STATIC, recompile_limit=14, isolate_recompiles=True)
    except TypeError:
        pytest.skip("this torch has no limit of one compilation")
    sra.patch(pipe, sra.SparseRef("grid", sra.Linear(0.1, 0.9)))
    case.call(pipe, steps=14)
    with pytest.raises(sra.IncompatibleError, match=r"at most 14 .*got 15 new"):
        case.call(pipe, steps=15, side=96)


def test_lengths_of_several_runs_add_up() -> None:
    """Other sizes, other references, another number of steps: each run alone has few enough."""
    case, pipe = CASES["klein"], compiled("klein")
    sra.patch(pipe, sra.SparseRef("grid", sra.Linear(0.1, 0.9)))
    case.call(pipe, steps=3)
    case.call(pipe, steps=3, side=96)
    case.call(pipe, steps=3)
    for others in ({"side": 128}, {"references": 2}):
        with pytest.raises(sra.IncompatibleError, match=r"6 of 8 graphs are taken, .*got 3 new ones"):
            case.call(pipe, steps=3, **others)
    case.call(pipe, steps=3, side=96)
    torch._dynamo.reset()
    case.call(pipe, steps=3, side=128)


def test_runs_of_several_models_and_patches_add_up() -> None:
    case, one, two = CASES["klein"], compiled("klein"), compiled("klein")
    wide = CASES["klein"].build(heads=4)
    wide.transformer.compile_repeated_blocks(**STATIC)
    for pipe in (one, two, wide):
        sra.patch(pipe, sra.SparseRef("grid", sra.Linear(0.1, 0.9)))
    case.call(one, steps=5)
    case.call(two, steps=5)  # the same graphs
    sra.patch(one, sra.SparseRef("grid", sra.Linear(0.1, 0.9)))
    case.call(one, steps=5)
    with pytest.raises(sra.IncompatibleError, match=r"5 of 8 graphs are taken, .*got 5 new ones"):
        case.call(wide, steps=5)


def test_whole_calls_before_and_after_are_left_to_torch() -> None:
    case, pipe = CASES["klein"], compiled("klein")
    for side in range(64, 64 + 16 * 8, 16):
        case.call(pipe, steps=1, side=side)
    handle = sra.patch(pipe, sra.SparseRef("grid", 1.0))
    case.call(pipe, steps=1)
    handle.remove()
    sra.patch(pipe, sra.SparseRef("grid", 0.5))
    with pytest.raises(sra.IncompatibleError, match=r"8 of 8 graphs are taken, .*got 1 new ones"):
        case.call(pipe, steps=1)


def test_an_own_loop_whose_times_nobody_knows() -> None:
    model, batch = build("klein").eval(), Batch("klein")
    model.compile_repeated_blocks(**STATIC)
    for budget, fits in ((sra.Linear(0.1, 0.9), False), (sra.Linear(0.1, 0.9).piecewise(3), True)):
        sra.patch(model, sra.SparseRef("grid", budget))
        with torch.no_grad():
            if fits:
                for t in (1.0, 0.8, 0.3):
                    model(**batch.kwargs | {"timestep": torch.full((2,), t)})
            else:
                with pytest.raises(sra.IncompatibleError, match=r"at most 8 .*piecewise"):
                    model(**batch.kwargs)


def test_a_batch_runs_its_joined_calls_uncompiled() -> None:
    pipe = compiled("klein")
    from tests.pictures import picture

    done = sra.batch(
        pipe, ["a", "b"], [[picture(64, 64, 0)], [picture(96, 64, 1)]], config=sra.SparseRef("grid", sra.Linear(0.1, 0.9)),
        num_inference_steps=14, height=64, width=64,
    )  # fmt: skip
    assert len(done.images) == 2


@pytest.mark.parametrize("name", ["klein", "kontext", "qwen_edit_plus"])
def test_training_on_blocks_compiled_for_one_length_each(name: str) -> None:
    """Another length in each draw: it died within a few steps."""
    model, batch = lora(build(name)), Batch(name)
    model.compile_repeated_blocks(**STATIC)
    drop = sra.RandomDrop(keep=(0.1, 0.9))
    sra.patch_for_training(model, drop)
    got = len(drop.counts(batch.sizes))
    with pytest.raises(
        sra.IncompatibleError, match=rf"at most 8 .*got {got} new ones of RandomDrop.*one keep ratio.*dynamic=None"
    ):
        batch.loss(model)
    sra.patch_for_training(model, sra.RandomDrop(keep=0.5, full_probability=0.3))
    for _ in range(6):
        batch.loss(model).backward()


def test_training_where_a_length_makes_several_graphs() -> None:
    """A first block of frozen weights gets inputs without gradients, and so a graph of its own."""
    model, batch = lora(build("klein")), Batch("klein")
    model.compile_repeated_blocks(**STATIC)
    total = sum(batch.sizes)
    sra.patch_for_training(model, sra.RandomDrop(keep=(10 / total, 15 / total)))
    with pytest.raises(sra.IncompatibleError, match=r"at most 4 sequence lengths .*2 of 8 graphs are taken"):
        for _ in range(8):
            batch.loss(model).backward()


@pytest.mark.parametrize("dynamic", [None, True])
def test_training_on_other_blocks_is_not_refused(dynamic: bool | None) -> None:
    model, batch = lora(build("klein")), Batch("klein")
    model.compile_repeated_blocks(**STATIC | {"dynamic": dynamic})
    sra.patch_for_training(model, sra.RandomDrop(keep=(0.1, 0.9)))
    for _ in range(10):
        batch.loss(model).backward()
