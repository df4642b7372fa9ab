"""Bit for bit the unpatched pipeline: with every token kept, without references, and after `remove`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.base import Kwargs
from sparse_ref_attn.models.flux2 import Flux2Adapter
from tests.contract.state import ALL, GRID, MASS, kinds, state
from tests.pipelines import CASES, Case, each_case

KLEIN = CASES["klein"]


@each_case()
def test_every_token_kept_and_after_remove(case: Case) -> None:
    """With guidance, two images a prompt, and as many prompts and references as the pipeline allows."""
    pipe = case.build()
    request: dict[str, Any] = {"steps": 2, "images_per_prompt": 2, "cfg": case.cfg}
    request |= {"batch": max(case.batch), "references": max(case.references)}
    dense = case.call(pipe, **request)
    handle = sra.patch(pipe, ALL)
    assert np.array_equal(dense, case.call(pipe, **request))
    assert kinds(handle)[0] == "profile"
    sparse = sra.patch(pipe, GRID)
    assert not np.array_equal(dense, case.call(pipe, **request))
    sparse.remove()
    assert np.array_equal(dense, case.call(pipe, **request))


@pytest.mark.parametrize("name", ["kontext", "klein_kv", "qwen_edit_plus_2511"])
def test_remove_leaves_nothing_behind(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    case.call(pipe, steps=2)
    before = state(pipe)
    handle = sra.patch(pipe, MASS)
    assert state(pipe) != before
    patched = state(pipe)
    case.call(pipe, steps=2)
    assert kinds(handle)[0] == "profile"
    assert state(pipe) == patched  # the private backends are gone again after the profiling step
    handle.remove()
    assert state(pipe) == before
    handle.remove()
    assert state(pipe) == before


def test_remove_in_the_middle_of_a_run() -> None:
    pipe = KLEIN.build()
    KLEIN.call(pipe, steps=1)
    before = state(pipe)
    handle = sra.patch(pipe, MASS)

    def off(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        if step == 0:  # the first step was profiled, so it was dense
            handle.remove()
        return kwargs

    image = KLEIN.call(pipe, callback=off)
    assert kinds(handle) == ["profile"]
    assert state(pipe) == before
    assert np.array_equal(image, KLEIN.call(pipe))


def test_remove_within_a_call() -> None:
    """torch has the list of hooks by then, and calls the library's all the same."""
    pipe = KLEIN.build()
    dense = KLEIN.call(pipe)
    handles: list[sra.PatchHandle] = []
    for register in (pipe.transformer.register_forward_pre_hook, pipe.transformer.register_forward_hook):
        with register(lambda module, *args: handles[-1].remove()):
            handles.append(sra.patch(pipe, GRID))
            KLEIN.call(pipe)
        assert np.array_equal(dense, KLEIN.call(pipe))


def test_patched_takes_itself_off_also_after_an_error() -> None:
    pipe = KLEIN.build()
    KLEIN.call(pipe, steps=1)
    before = state(pipe)

    def fail() -> None:
        with sra.patched(pipe, GRID) as handle:
            KLEIN.call(pipe, steps=1)
            assert kinds(handle) == ["sparse"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert state(pipe) == before


@each_case(lambda case: case.text_to_image)
def test_text_to_image(case: Case) -> None:
    pipe = case.build()
    image = case.call(pipe, references=0, steps=2)
    handle = sra.patch(pipe, MASS)
    assert np.array_equal(image, case.call(pipe, references=0, steps=2))
    with pytest.raises(sra.SparseRefError, match="a run with reference images must have taken place"):
        _ = handle.record
    case.call(pipe, steps=2)
    record = handle.record
    assert np.array_equal(image, case.call(pipe, references=0, steps=2))
    assert handle.record is record  # of the last run with references


def test_layout_is_read_once_a_run() -> None:
    """Reading it copies position ids to the host: not in each step, and not in each step without references either."""

    class Counting(Flux2Adapter):
        found = 0

        def find(self, kwargs: Kwargs) -> Any:
            Counting.found += 1
            return super().find(kwargs)

    pipe = KLEIN.build()
    sra.patch(pipe, GRID, adapter=Counting())
    for references, wanted in ((0, 1), (2, 2), (2, 3), (0, 4)):
        KLEIN.call(pipe, references=references, cfg=True)
        assert Counting.found == wanted
