"""What goes wrong in a batch is told by item, refused before anything runs, and leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.errors import BatchError, ConfigError, IncompatibleError
from tests.contract.state import GRID, MASS, state
from tests.pictures import generator, picture
from tests.pipelines import CASES
from tests.test_batch import Items, as_built, assert_close, threads


class StopError(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "error"),
    [("kontext", StopError("no")), ("klein", KeyboardInterrupt()), ("qwen_edit_plus", StopError("no"))],
)
def test_an_error_in_one_item_ends_the_batch(name: str, error: BaseException) -> None:
    case = CASES[name]
    pipe = case.build()
    items = Items(case, pipe)
    begun = []
    want, _ = as_built(name)

    def fail(pipe: Any, step: int, t: Any, kwargs: dict) -> dict:
        begun.append(step)
        if step == 1:
            raise error
        return kwargs

    items.each[1]["callback_on_step_end"] = fail
    case.call(pipe, steps=1)  # loads what diffusers loads late
    before = state(pipe)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BatchError
    with pytest.raises(expected) as raised:
        items.together(MASS)
    if expected is BatchError:
        assert raised.value.item == 1
        assert raised.value.__cause__ is error
        assert str(raised.value) == "item 1 of the batch failed: StopError: no"
    assert begun == [0, 1]
    assert state(pipe) == before
    assert not threads()
    del items.each[1]["callback_on_step_end"]
    assert_close(items.together(MASS).images, want)


@pytest.mark.parametrize("name", ["klein", "klein_kv"])
def test_a_batch_after_an_interrupted_run_of_a_patched_pipeline(name: str) -> None:
    """What the run left on the attention comes off while the batch's own backends are on it."""
    case = CASES[name]
    pipe = case.build()
    items = Items(case, pipe)
    want, _ = as_built(name)
    case.call(pipe, steps=1)  # loads what diffusers loads late
    before = state(pipe)
    handle = sra.patch(pipe, MASS)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.call(pipe)
    hook.remove()
    assert_close(items.together(None).images, want)
    handle.remove()
    assert state(pipe) == before


def test_an_error_before_the_first_step_and_one_in_the_joined_call(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["klein"]
    pipe = case.build()
    items = Items(case, pipe)
    case.call(pipe)
    before = state(pipe)
    items.each[2]["callback_on_step_end_tensor_inputs"] = ["nothing"]
    with pytest.raises(
        BatchError, match=r"item 2 of the batch failed: ValueError: .*callback_on_step_end_tensor_inputs"
    ):
        items.together(GRID)
    del items.each[2]["callback_on_step_end_tensor_inputs"]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("sparse_ref_attn.patching.execution.ragged_rows.gather_attention", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        items.together(MASS)
    assert state(pipe) == before
    assert not threads()


def test_an_interrupt_while_an_item_runs_waits_for_it_and_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the main thread, which then stands in `resume`."""
    from sparse_ref_attn.batching.lockstep import Lockstep

    case = CASES["klein"]
    pipe = case.build()
    items = Items(case, pipe)
    waits, true = [], Lockstep._wait

    def interrupted(self: Any) -> bool:
        waits.append(self)
        if len(waits) == 5:
            raise KeyboardInterrupt
        return true(self)

    case.call(pipe)
    before = state(pipe)
    monkeypatch.setattr(Lockstep, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        items.together(GRID)
    assert state(pipe) == before
    assert not threads()


def test_a_bad_budget_names_its_item() -> None:
    case = CASES["klein"]
    config = sra.SparseRef("grid", 100)  # more tokens than the first item's reference has
    items = Items(case, case.build())
    with pytest.raises(BatchError, match=r"item 0 of the batch failed: BudgetError") as raised:
        items.together(config)
    assert isinstance(raised.value.__cause__, sra.BudgetError)


def call(**changes: Any) -> None:
    pipe = CASES[changes.pop("case", "klein")].build()
    red, blue = picture(64, 64, 0), picture(96, 64, 1)
    arguments: dict[str, Any] = {"prompts": ["a", "b"], "images": [[red], [red, blue]], "config": GRID}
    sra.batch(pipe, **arguments | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": "a cat"}, "prompts must be a list of one prompt an item, got 'a cat'"),
        ({"prompts": []}, "prompts must be a list of one prompt an item, got []"),
        ({"prompts": ["a", ["b", "c"]]}, "each prompt must be one string, got ['b', 'c']"),
        ({"images": [[]]}, "images must be a list of one entry for each of the 2 prompts, got 1"),
        ({"images": None}, "images must be a list of one entry for each of the 2 prompts, got NoneType"),
        ({"images": [[], picture(64, 64, 0)]}, "images must hold a list of references for each item, got Image"),
        ({"images": [[], [None]]}, "references must be images, got None for item 1"),
        ({"generators": [generator(0)]}, "generators must be a list of one entry for each of the 2 prompts, got 1"),
        ({"generators": [generator(0)] * 2}, "a generator of its own, got the same for items 0 and 1"),
        ({"generators": [0, 1]}, "generators must be torch.Generator, one an item, got int"),
        ({"each": [{}, [("seed", 1)]]}, "each must be a list of arguments by name, a dict an item, got [('seed', 1)]"),
        ({"each": [{}]}, "each must be a list of one entry for each of the 2 prompts, got 1"),
        ({"generator": generator(0)}, "generator must be given as generators, one an item"),
        ({"each": [{}, {"image": 1}]}, "image must be given as images, one an item"),
        ({"config": [0.5]}, "config must be a SparseRef (ReCAST(...), SparseContext(...)), a preset's name or a share"),
        ({"config": sra.SparseRef("grid", 0.3, from_block=1)}, "got 1 and 'step'"),
        ({"config": sra.ReCAST(profile="in_flight")}, "must be 0 and profile \"step\", got 0 and 'in_flight'"),
        ({"case": "kontext"}, "FluxKontextPipeline takes at most 1 reference an item, got 2 for item 1"),
        ({"case": "qwen_edit", "images": [[], []]}, "needs a reference for every item, got none for item 0"),
        ({"case": "qwen_edit_plus", "images": [[picture(64, 64, 0)], []]}, "for every item, got none for item 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        call(**changes)
    assert words in str(refused.value)


def test_items_that_one_call_cannot_serve() -> None:
    case = CASES["flux2"]
    items = Items(case, case.build())
    items.each[1] |= {"attention_kwargs": {"scale": 0.5}}
    with pytest.raises(IncompatibleError, match=r"the same joint_attention_kwargs, got None, {'scale': 0.5}"):
        items.together(GRID)
    assert not threads()


def test_context_parallelism_is_refused() -> None:
    case = CASES["klein"]
    pipe = case.build()
    items = Items(case, pipe)
    pipe.transformer._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(IncompatibleError, match="must lie in one process, got context parallelism"):
        items.together(GRID)
    assert not threads()


def test_a_step_cache_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    case = CASES["klein"]
    pipe = case.build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(IncompatibleError, match="must not go through a step cache"):
        Items(case, pipe).together(GRID)
