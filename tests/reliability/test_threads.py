"""Two pipelines in two threads, in different modes, and patched or freed while the other runs: each as if alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest

import sparse_ref_attn as sra
from tests.contract.state import state
from tests.latents import CASES

MODES = {
    "tokens": ("klein", sra.SparseRef("mass", sra.Linear(0.2, 0.6))),
    "cache": ("klein_kv", sra.SparseRef("mass", sra.Linear(0.2, 0.6), "cache", rerank_every=1)),
    "both": ("klein_kv", sra.SparseRef("edges", 0.4, "both")),
    "in_flight": ("kontext", sra.SparseRef("mass", 0.3, profile="in_flight")),
    "from_block": ("qwen_edit_plus", sra.SparseRef("mass", 0.3, from_block=1)),
    "dense": ("kontext", None),
}


def images(mode: str, pipe: Any, count: int) -> list[np.ndarray]:
    """Of `count` runs with other references and noise each."""
    case = CASES[MODES[mode][0]]
    return [case.call(pipe, references=max(case.references), seed=i % 3, first=i % 3, steps=2) for i in range(count)]


def patched(mode: str) -> tuple[Any, sra.PatchHandle | None]:
    name, config = MODES[mode]
    pipe = CASES[name].build()
    CASES[name].call(pipe, steps=1)  # a first call sets what a pipeline keeps
    return pipe, None if config is None else sra.patch(pipe, config)


def left(pipe: Any) -> list[str]:
    """What is left of a patch (`state` would look at the tables that both threads share)."""
    hooks = [name for name, m in pipe.transformer.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    own = [name for name, p in pipe.transformer.attn_processors.items() if "sparse" in str(p._attention_backend)]
    return hooks + own + ["vae.encode"] * ("encode" in vars(pipe.vae))


def together(*work: Callable[[], Any]) -> list[Any]:
    """The results of functions that start at the same time, a thread each."""
    gate = threading.Barrier(len(work))

    def begin(function: Callable[[], Any]) -> Any:
        gate.wait()
        return function()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(begin, work))


def side_by_side(modes: tuple[str, ...], count: int) -> None:
    alone = [images(mode, patched(mode)[0], min(count, 3)) for mode in modes]
    pairs = [patched(mode) for mode in modes]
    before = [state(pipe) for pipe, _ in pairs]
    work = [partial(images, mode, pipe, count) for mode, (pipe, _) in zip(modes, pairs, strict=True)]
    found = together(*work)
    for mine, wanted in zip(found, alone, strict=True):
        for i, image in enumerate(mine):
            assert np.array_equal(image, wanted[i % 3])
    assert [state(pipe) for pipe, _ in pairs] == before


def while_the_other_runs(mode: str, count: int, random: Random) -> int:
    """Patches and removals in one thread while the other generates; how many there were."""
    wanted = images(mode, patched(mode)[0], 3)
    pipe, _ = patched(mode)
    other = CASES["klein_kv"].build()
    dense = CASES["klein_kv"].call(other, steps=2)
    done = threading.Event()
    patches = 0

    def generate() -> list[np.ndarray]:
        try:
            return images(mode, pipe, count)
        finally:
            done.set()

    def change() -> None:
        nonlocal patches
        while not done.is_set():
            config = MODES[random.choice(("tokens", "cache", "both"))][1]
            handle = sra.patch(other, config)
            if random.random() < 0.3:
                CASES["klein_kv"].call(other, steps=2)
            handle.remove()
            patches += 1

    mine, _ = together(generate, change)
    for i, image in enumerate(mine):
        assert np.array_equal(image, wanted[i % 3])
    assert np.array_equal(CASES["klein_kv"].call(other, steps=2), dense)
    assert not left(other)
    return patches


@pytest.mark.parametrize("modes", [("tokens", "cache"), ("both", "in_flight")], ids="+".join)
def test_two_modes_in_two_threads(modes: tuple[str, ...]) -> None:
    side_by_side(modes, 3)


def test_patched_and_removed_while_the_other_runs() -> None:
    assert while_the_other_runs("cache", 3, Random(0)) > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_two_modes_in_two_threads(record_property: Callable[[str, object], None]) -> None:
    pairs = [(a, b) for i, a in enumerate(MODES) for b in list(MODES)[i:]]
    for modes in pairs:
        side_by_side(modes, 12)
    record_property("count", 24 * len(pairs))
    record_property("detail", f"generations in {len(pairs)} pairs of threads")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_six_threads(record_property: Callable[[str, object], None]) -> None:
    side_by_side(tuple(MODES), 30)
    record_property("count", 30 * len(MODES))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", list(MODES))
def test_many_patches_while_the_other_runs(mode: str, record_property: Callable[[str, object], None]) -> None:
    record_property("count", while_the_other_runs(mode, 60, Random(0)))
    record_property("detail", "patches and removals beside 60 generations")
