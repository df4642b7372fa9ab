"""`torch.compile`: block by block without new graphs or breaks, as a whole after the patch, refused before it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from tests.contract.state import MASS, kinds, steps
from tests.pipelines import CASES

LIMIT = 4  # graphs that torch compiles of a kind of block here
DEEP = {  # more blocks than that, so that a graph a block would be an error; test_stored_compiled has the other kinds
    "klein": {"layers": 0, "single": 5},
    "kontext": {"layers": 5, "single": 0},
    "qwen_edit_plus": {"layers": 5},
}
ONE = {"layers": 0, "single": 1}
VARYING, FROM = schedules.Linear(0.1, 0.9), 2
SETTINGS = {
    "mass": sra.SparseRef("mass", VARYING),
    "depth": sra.SparseRef("mass", VARYING, from_block=FROM),
    "in flight": sra.SparseRef("mass", VARYING, profile="in_flight", profile_blocks=FROM),
}
ORDERS = {  # the first patch comes before the compiler, on each model another; with Qwen the compiler comes first
    "klein": ("mass", "depth", "in flight"),
    "kontext": ("depth", "in flight", "mass"),
    "qwen_edit_plus": ("in flight", "mass", "depth"),
}


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # After each compilation torch empties the CPU's caches and times its guards, which nobody reads here.
    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *arguments: 0.0, raising=False)
    gc.collect()  # or a pipeline of an earlier test goes in the middle of a compilation, and its backends with it
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are, and counts them and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return run


@torch._dynamo.config.patch(recompile_limit=LIMIT)
@pytest.mark.parametrize(("name", "order"), ORDERS.items(), ids=list(ORDERS))
def test_repeated_blocks(name: str, order: tuple[str, ...]) -> None:
    """No breaks, no new graphs for a new count, whether blocks were compiled (and run) before a patch or after it."""
    case, backend = CASES[name], Counting()
    plain, pipe = case.build(**DEEP[name]), case.build(**DEEP[name])
    blocks, compiler_first = sum(DEEP[name].values()), name == "qwen_edit_plus"
    if compiler_first:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        case.call(pipe, steps=1)

    def note(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        seen.append((backend.graphs, backend.calls - called))
        return kwargs

    for setting in order:
        called, seen = backend.calls, []
        expected, handle = sra.patch(plain, SETTINGS[setting]), sra.patch(pipe, SETTINGS[setting])
        if setting == order[0] and not compiler_first:
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        for first in (0, 3):
            got = case.call(pipe, steps=6, first=first, callback=note)
            np.testing.assert_allclose(got, case.call(plain, steps=6, first=first), atol=1e-5)
            assert steps(handle) == steps(expected)
            assert len({step.kept for step in handle.record.steps}) == 6
        graphs, calls = zip(*seen, strict=True)
        eager = FROM if setting == "in flight" else blocks  # what measures runs uncompiled
        assert calls == tuple(blocks * n - eager * (1 + n // 7) for n in range(1, 13))
        assert set(graphs[2:]) == {graphs[2]}
        if setting == order[0] == "mass":
            assert 0 == graphs[0] < graphs[1] < graphs[2]  # one length, then any length
    assert not counters["graph_break"]
    compiled = backend.graphs, backend.calls + 2 * blocks
    handle.remove()
    case.call(pipe, steps=2)
    assert (backend.graphs, backend.calls) == compiled


def method(pipe: Any, **options: Any) -> None:
    pipe.transformer.compile(**options)


def function(pipe: Any, **options: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, **options)


def test_compiled_as_a_whole_after_the_patch() -> None:
    """The compiler steps around the hooks; it traced into them and failed at a step that measures.

    Compiled in each way, with each way to measure; then references leave by depth on one model, at the input on the
    other. What torch compiled for the first model serves the second.
    """
    case, backend = CASES["klein"], Counting()
    by_depth = sra.SparseRef("mass", VARYING, from_block=1)
    in_flight = sra.SparseRef("mass", VARYING, profile="in_flight", profile_blocks=1)
    for compile_, config, first in ((function, by_depth, "profile"), (method, in_flight, "in_flight")):
        plain, pipe = (case.build(layers=0, single=2) for _ in range(2))
        dense = case.call(plain, steps=2)
        expected, handle = sra.patch(plain, config), sra.patch(pipe, config)
        called = backend.calls
        compile_(pipe, backend=backend, dynamic=False)
        np.testing.assert_allclose(case.call(pipe, steps=2), case.call(plain, steps=2), atol=1e-5)
        assert kinds(handle) == [first, "sparse"]
        assert steps(handle) == steps(expected)
        assert backend.calls > called
        handle.remove()
        np.testing.assert_allclose(case.call(pipe, steps=2), dense, atol=1e-5)


@pytest.mark.parametrize("compile_", [method, function])
def test_one_graph_as_a_whole_is_refused_by_the_compiler(compile_: Callable[..., None]) -> None:
    case = CASES["klein"]
    pipe = case.build(**ONE)
    handle = sra.patch(pipe, MASS)
    compile_(pipe, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile_repeated_blocks"):
        case.call(pipe)
    handle.remove()


@pytest.mark.parametrize("compile_", [method, function])
def test_compiled_as_a_whole_before_the_patch_is_refused(compile_: Callable[..., None]) -> None:
    """torch would never call the hooks: nothing would be dropped, and nobody told."""
    pipe = CASES["klein"].build(**ONE)
    compile_(pipe, backend="eager")
    for model in (pipe, pipe.transformer):
        with pytest.raises(
            sra.IncompatibleError, match=r"must not be compiled as a whole when it is patched.*compile_re"
        ):
            sra.patch(model, MASS)
    assert not pipe.transformer._forward_hooks
    assert "encode" not in vars(pipe.vae)
