"""One run knows nothing of the one before: no stale reference, no growth, no random number drawn."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from tests.contract import patched
from tests.contract.state import GRID, MASS, kinds, steps
from tests.pictures import generator
from tests.pipelines import CASES, Case

KLEIN = CASES["klein"]


@pytest.mark.parametrize(
    ("case", "cfg"),
    [
        pytest.param(case, cfg, id=f"{case.name}-{cfg}")
        for case in CASES.values()
        for cfg in ((False, True) if case.name in ("kontext", "klein", "qwen_edit_plus") else (case.cfg,))
    ],
)
def test_no_reference_of_the_last_image(case: Case, cfg: bool) -> None:
    config = sra.SparseRef(sra.Edges() if case.name == "klein" else "mass", 0.3)
    pipe = case.build()
    handle = sra.patch(pipe, config)
    first = case.call(pipe, steps=2, cfg=cfg)
    kept = handle.record.steps[-1].selection
    if case.text_to_image:
        case.call(pipe, steps=2, references=0)
    second = case.call(pipe, steps=2, cfg=cfg, first=5)
    image, wanted = patched.run(case, config, steps=2, cfg=cfg, first=5)
    assert np.array_equal(second, image)
    assert steps(handle) == wanted
    assert kept is not None
    other = handle.record.steps[-1].selection
    assert other is not None
    assert not torch.equal(kept.indices, other.indices)  # else the ranking of the first would have done as well
    assert np.array_equal(first, case.call(pipe, steps=2, cfg=cfg))


def test_other_sizes_and_numbers_in_the_next_image() -> None:
    pipe = KLEIN.build()
    handle = sra.patch(pipe, MASS)
    for request in ({"references": 3}, {"references": 1}, {"references": 2, "batch": 2}, {"sizes": ((64, 96),)}):
        image, wanted = patched.run(KLEIN, MASS, **request)
        assert np.array_equal(KLEIN.call(pipe, **request), image), request
        assert steps(handle) == wanted
        assert handle.record.batch == request.get("batch", 1)


@cache
def drawn() -> torch.Tensor:
    """The state of a user's generator after a run without a patch."""
    plain = generator(7)
    KLEIN.call(KLEIN.build(), generator=plain)
    return plain.get_state()


@pytest.mark.parametrize(
    "select",
    [
        "random",
        "grid",
        "edges",
        "saliency",
        "mass",
        "self-attention",
        sra.Mix(((sra.AttentionMass(), 0.5), (sra.Random(), 0.5))),
    ],
    ids=str,
)
def test_random_numbers_are_the_users(select: Any) -> None:
    wanted, pipe = drawn(), KLEIN.build()
    handle = sra.patch(pipe, sra.SparseRef(select, 0.3))
    torch.manual_seed(11)
    np.random.seed(11)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    own = generator(7)
    image = KLEIN.call(pipe, generator=own)
    assert kinds(handle)[-1] == "sparse"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(own.get_state(), wanted)
    torch.manual_seed(12)
    assert np.array_equal(image, KLEIN.call(pipe, generator=generator(7)))  # reseeded every run


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit"])
def test_a_handle_does_not_keep_the_pipeline(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    handle = sra.patch(pipe, MASS)
    case.call(pipe)
    summary = handle.summary("dict")
    parts = [weakref.ref(part) for part in (pipe, pipe.transformer, pipe.vae)]
    del pipe
    gc.collect()
    assert [part() for part in parts] == [None] * 3
    assert handle.record.steps  # which can still be read
    assert summary
    handle.remove()


def test_nothing_grows() -> None:
    pipe = KLEIN.build(layers=1, single=1)
    handle = sra.patch(
        pipe, sra.SparseRef(sra.Mix(((sra.AttentionMass(), 0.5), (sra.Edges(), 0.5))), sra.Linear(0.2, 0.8))
    )

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(thing), torch.Tensor) for thing in objects), len(objects)

    for i in range(4):
        KLEIN.call(pipe, steps=2, side=64, first=i)
    before = alive()
    for i in range(20):
        KLEIN.call(pipe, steps=2, side=64, first=i, references=1)
    after = alive()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 20  # not an object a run
    assert kinds(handle) == ["profile", "sparse"]


def test_remove_forgets_the_references() -> None:
    pipe = KLEIN.build()
    handle = sra.patch(pipe, GRID)
    KLEIN.call(pipe)
    run = handle._generations.run
    assert run is not None
    gone = weakref.ref(run.references.tokens)
    del run
    handle.remove()
    gc.collect()
    assert gone() is None
