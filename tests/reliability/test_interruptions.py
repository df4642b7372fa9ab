"""A run broken off at any point of any mode, offloaded or not: nothing half on, and the next run is the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.hooks.diffusers import PrivateBackend
from tests.contract.state import state
from tests.contract.test_offload import by_model, sequential
from tests.pipelines import CASES

STEPS = 3
MODES = {
    "kontext": ("tokens", "from_block", "in_flight"),
    "klein": ("tokens", "from_block", "in_flight", "reranked"),
    "klein_kv": ("tokens", "cache", "both", "reranked_cache"),
    "qwen_edit_plus": ("tokens", "from_block", "in_flight"),
}
CONFIGS = {
    "tokens": sra.SparseRef("mass", sra.Linear(0.2, 0.6)),
    "from_block": sra.SparseRef("mass", sra.Linear(0.2, 0.6), from_block=1),
    "in_flight": sra.SparseRef("mass", 0.3, profile="in_flight", from_block=1),
    "reranked": sra.SparseRef("mass", 0.3, rerank_every=1),
    "cache": sra.SparseRef("edges", sra.Linear(0.2, 0.6), "cache"),
    "both": sra.SparseRef("mass", 0.3, "both"),
    "reranked_cache": sra.SparseRef("mass", sra.Linear(0.2, 0.6), "cache", rerank_every=1),
}
ERRORS = (KeyboardInterrupt, ZeroDivisionError, torch.OutOfMemoryError)


class Point:
    """Somewhere in a run: the `call`-th time that a named place is reached.

    Places are ``transformer``, ``blocks.N``, ``attention.N`` (its output projection, after the private backend),
    ``vae.encode``, ``vae.decode`` and ``callback``.
    """

    def __init__(self, place: str, call: int) -> None:
        self.place, self.call = place, call

    def __repr__(self) -> str:
        return f"{self.place} at call {self.call}"

    @contextmanager
    def reached(self, pipe: Any, then: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Inside, `then` is called whenever the place is; gives the arguments of the pipeline's call for it."""

        def callback(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            then()
            return kwargs

        module = self._module(pipe)
        hook = None if module is None else module.register_forward_hook(lambda *arguments: then())
        try:
            yield {"callback": callback} if module is None else {}
        finally:
            if hook is not None:
                hook.remove()

    @contextmanager
    def raises(self, pipe: Any, error: type[BaseException]) -> Iterator[dict[str, Any]]:
        """Inside, that call raises."""
        calls = count()

        def stop() -> None:
            if next(calls) == self.call:
                raise error("planted")

        with self.reached(pipe, stop) as arguments:
            yield arguments

    def _module(self, pipe: Any) -> torch.nn.Module | None:
        name, _, index = self.place.partition(".")
        if name == "callback":
            return None
        if name == "transformer":
            return pipe.transformer
        if name == "vae":
            return pipe.vae.encoder if index == "encode" else pipe.vae.decoder
        block = _blocks(pipe)[int(index)]
        if name == "blocks":
            return block
        attention = block.attn
        out = getattr(attention, "to_out", None) or getattr(block, "proj_out", None) or attention
        return out[0] if isinstance(out, torch.nn.ModuleList) else out


def _blocks(pipe: Any) -> list[torch.nn.Module]:
    model = pipe.transformer
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]


class Bench:
    """One patched pipeline, and what its runs give when nothing breaks them off."""

    def __init__(self, name: str, mode: str, offload: Callable[[Any], None] | None = None) -> None:
        self.case, self.mode = CASES[name], mode
        self.pipe = self.case.build()
        if offload is not None:
            offload(self.pipe)
        self.dense = self._call()
        self.plain = state(self.pipe) if offload is None else None
        self.handle = sra.patch(self.pipe, CONFIGS[mode])
        self.wanted = self._call(first=1)
        self.steps = [(step.kind, step.kept) for step in self.handle.record.steps]
        self.patched = state(self.pipe) if offload is None else None

    def _call(self, **more: Any) -> np.ndarray:
        return self.case.call(self.pipe, references=max(self.case.references), steps=STEPS, **more)

    def points(self) -> list[Point]:
        """Every point that a run comes by."""
        places = [f"{kind}.{i}" for i in range(len(_blocks(self.pipe))) for kind in ("blocks", "attention")]
        places = ["transformer", "callback", "vae.encode", "vae.decode", *places]
        calls: list[str] = []
        with ExitStack() as stack:
            arguments: dict[str, Any] = {}
            for place in places:
                arguments |= stack.enter_context(Point(place, 0).reached(self.pipe, partial(calls.append, place)))
            self._call(**arguments)
        assert set(calls) == set(places), "a run must come by every place"
        return [Point(place, call) for place in places for call in range(calls.count(place))]

    def broken_off(self, point: Point, error: type[BaseException]) -> None:
        with point.raises(self.pipe, error) as arguments, pytest.raises(error, match="planted"):
            self._call(**arguments)
        if self.patched is not None and error is not KeyboardInterrupt:  # torch then calls no hook; the next call does
            assert state(self.pipe) == self.patched, point
        assert np.array_equal(self._call(first=1), self.wanted), point
        assert [(step.kind, step.kept) for step in self.handle.record.steps] == self.steps, point
        if self.patched is not None:
            assert state(self.pipe) == self.patched, point

    def end(self, point: Point, error: type[BaseException]) -> None:
        """Broken off once more, and taken off at once."""
        with point.raises(self.pipe, error) as arguments, pytest.raises(error, match="planted"):
            self._call(**arguments)
        self.handle.remove()
        if self.plain is not None:
            assert state(self.pipe) == self.plain, point
        assert np.array_equal(self._call(), self.dense), point


ALL = [(name, mode) for name, modes in MODES.items() for mode in modes]


@pytest.mark.parametrize(("name", "mode"), [ALL[0], ALL[5], ALL[10], ALL[13]])
def test_at_some_points(name: str, mode: str) -> None:
    random, bench = Random(f"{name} {mode}"), Bench(name, mode)
    points = bench.points()
    for point in random.sample(points, 3):
        bench.broken_off(point, random.choice(ERRORS))
    bench.end(random.choice(points), random.choice(ERRORS))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "mode"), ALL)
def test_at_every_point(name: str, mode: str, record_property: Callable[[str, object], None]) -> None:
    bench = Bench(name, mode)
    points = bench.points()
    for i, point in enumerate(points):
        bench.broken_off(point, ERRORS[i % len(ERRORS)])
    bench.end(points[-1], KeyboardInterrupt)
    record_property("count", len(points) + 1)


@pytest.mark.parametrize(
    ("name", "mode", "offload"), [("klein_kv", "cache", by_model), ("kontext", "tokens", sequential)]
)
def test_offloaded_at_some_points(name: str, mode: str, offload: Callable[[Any], None]) -> None:
    random, bench = Random(0), Bench(name, mode, offload)
    points = bench.points()
    for point in random.sample(points, 2):
        bench.broken_off(point, random.choice(ERRORS))
    bench.end(random.choice(points), ZeroDivisionError)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("offload", [by_model, sequential])
@pytest.mark.parametrize(("name", "mode"), ALL)
def test_offloaded_at_many_points(
    name: str, mode: str, offload: Callable[[Any], None], record_property: Callable[[str, object], None]
) -> None:
    random, bench = Random(f"{name} {mode}"), Bench(name, mode, offload)
    points = random.sample(bench.points(), 10)
    for point in points:
        bench.broken_off(point, random.choice(ERRORS))
    bench.end(points[0], KeyboardInterrupt)
    record_property("count", len(points) + 1)


def test_a_call_that_stays_half_on_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its way back taken out, a private attention backend stays on a processor."""
    bench = Bench("klein", "tokens")
    monkeypatch.setattr(PrivateBackend, "leave", lambda backend: None)
    with pytest.raises(AssertionError):
        bench.broken_off(Point("blocks.1", 0), ZeroDivisionError)
