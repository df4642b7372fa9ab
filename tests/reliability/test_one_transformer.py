"""Several generations on one patched transformer at a time: in threads, or one within another's callback."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sparse_ref_attn as sra
from tests.contract.state import state
from tests.latents import CASES
from tests.pairwise import pairwise
from tests.pipelines import Case
from tests.reliability.test_threads import together

CONFIGS = {
    "mass": ("klein", sra.SparseRef("mass", sra.Linear(0.2, 0.6))),
    "edges": ("klein", sra.SparseRef("edges", 0.25)),
    "reranked": ("klein", sra.SparseRef("mass", sra.Linear(0.2, 0.6), rerank_every=2)),
    "cache": ("klein_kv", sra.SparseRef("mass", sra.Linear(0.2, 0.6), "cache")),
    "stored": ("klein", sra.SparseRef("mass", sra.Linear(0.2, 0.6), execute=sra.Cache(refresh=sra.At((2,))))),
    "tiles": ("klein", sra.SparseRef("mass", 0.3, execute=sra.Cache(per="tile", tile=3, refresh=sra.At((2,))))),
    "kontext": ("kontext", sra.SparseRef("mass", 0.3)),
}


def beside(pipe: Any) -> Any:
    """Another pipeline on the same transformer, with a scheduler of its own."""
    other = type(pipe).from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
    other.set_progress_bar_config(disable=True)
    return other


def request(case: Case, pipe: Any, i: int, **arguments: Any) -> np.ndarray:
    return case.call(pipe, first=7 * i, seed=i, steps=3, **arguments)


@pytest.mark.parametrize("name", ["mass", "edges", "reranked", "cache", "stored", "tiles"])
def test_two_requests_in_two_threads(name: str) -> None:
    """Each gets the picture that it gets alone; without the thread's own state half of them were wrong.

    On FLUX.2 alone: unpatched Kontext and Qwen pipelines that share their parts differ in threads, by their tokenizers.
    """
    case, config = CASES[CONFIGS[name][0]], CONFIGS[name][1]
    pipe = case.build()
    handle = sra.patch(pipe, config)
    first, second = beside(pipe), beside(pipe)
    alone = request(case, second, 1)
    for told, other in (("two others", first), ("the patched one and another", pipe)):
        wanted = request(case, other, 0)
        found = together(lambda other=other: request(case, other, 0), lambda: request(case, second, 1))
        assert np.array_equal(found[0], wanted), told
        assert np.array_equal(found[1], alone), told
    handle.remove()


def within(case: Case, outer: Any, inner: Any, at: int, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of a run of `outer`, and of one of `inner` that its callback makes after step `at`."""
    made = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            made.append(request(case, inner, 1, **arguments))
        return {}

    return request(case, outer, 0, callback=callback, **arguments), made[0]


@pairwise(
    name=["reranked", "stored", "kontext"],
    order=["the patched one first", "the other one first", "two others"],
    cfg={"plain": False, "guided": True},
    at=[0, 1],
)
def test_a_run_within_anothers_callback(name: str, order: str, cfg: bool, at: int) -> None:
    """Both pictures are those that they are alone, after whichever step the other one came in."""
    case, config = CASES[CONFIGS[name][0]], CONFIGS[name][1]
    pipe = case.build()
    sra.patch(pipe, config)
    outer, inner = {
        "the patched one first": (pipe, beside(pipe)),
        "the other one first": (beside(pipe), pipe),
        "two others": (beside(pipe), beside(pipe)),
    }[order]
    guided = {"cfg": cfg} if case.cfg else {}
    alone = request(case, outer, 0, **guided), request(case, inner, 1, **guided)
    for got, wanted in zip(within(case, outer, inner, at, **guided), alone, strict=True):
        assert np.array_equal(got, wanted)


def test_a_run_of_the_same_references_within_anothers_callback() -> None:
    case = CASES["klein"]
    pipe = case.build()
    sra.patch(pipe, CONFIGS["mass"][1])
    outer, inner = beside(pipe), beside(pipe)
    alone = case.call(outer, seed=0, steps=4), case.call(inner, seed=1, steps=3)
    made = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            made.append(case.call(inner, seed=1, steps=3))
        return {}

    assert np.array_equal(case.call(outer, seed=0, steps=4, callback=callback), alone[0])
    assert np.array_equal(made[0], alone[1])


def test_the_report_is_that_of_the_last_call() -> None:
    case = CASES["klein"]
    pipe = case.build()
    handle = sra.patch(pipe, CONFIGS["mass"][1])
    within(case, pipe, beside(pipe), 1)
    assert [step.index for step in handle.record.steps] == [0, 1, 2]
    assert handle.record.total_steps == 3


def busy(pipe: Any, call: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """What `other` gives, or its error, while a call of the transformer is stopped in the middle in another thread."""
    reached, go_on = threading.Event(), threading.Event()
    blocks = getattr(pipe.transformer, "single_transformer_blocks", pipe.transformer.transformer_blocks)
    waiting = threading.get_ident()

    def stop(*_: Any) -> None:
        if threading.get_ident() != waiting and not reached.is_set():
            reached.set()
            go_on.wait(60)

    hook = blocks[-1].register_forward_pre_hook(stop)
    thread = threading.Thread(target=call)
    thread.start()
    try:
        assert reached.wait(60)
        return other()
    finally:
        go_on.set()
        thread.join()
        hook.remove()


@pytest.mark.parametrize("references", [0, 1])
def test_leaving_by_depth_wants_the_transformer_for_itself(references: int) -> None:
    """Blocks are changed for the time of a call: a second one is refused, and the first is as if alone."""
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef("edges", 0.3, from_block=1))
    other = beside(pipe)
    alone = request(case, pipe, 0), case.call(other, references=references, steps=2)
    found: list[np.ndarray] = []
    before = state(pipe)

    def refused() -> None:
        with pytest.raises(sra.IncompatibleError, match=r"calls of two threads.*from_block=0"):
            case.call(other, references=references, steps=2)

    busy(pipe, lambda: found.append(request(case, pipe, 0)), refused)
    assert np.array_equal(found[0], alone[0])
    assert np.array_equal(case.call(other, references=references, steps=2), alone[1])
    assert state(pipe) == before
    handle.remove()


def test_a_batch_wants_the_transformer_for_itself() -> None:
    case = CASES["klein"]
    pipe = case.build()
    handle = sra.patch(pipe, CONFIGS["edges"][1])
    other = beside(pipe)
    alone = request(case, other, 1)
    call = {"num_inference_steps": 2, "height": 64, "width": 64, "max_sequence_length": 48}
    call |= {"text_encoder_out_layers": (1, 2, 3), "output_type": "np"}
    from tests.pictures import picture

    def batch() -> Any:
        return sra.batch(pipe, ["a", "b"], [[picture(64, 64)], [picture(96, 64)]], **call)

    def refused() -> None:
        with pytest.raises(sra.IncompatibleError, match="while a batch runs on it in another thread"):
            request(case, other, 1)
        with pytest.raises(sra.IncompatibleError, match="on which another batch runs"):
            batch()

    busy(pipe, batch, refused)
    assert np.array_equal(request(case, other, 1), alone)
    assert handle.record.steps
