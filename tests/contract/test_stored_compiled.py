"""Compiled blocks where references are stored and read: no break, no graph a layer, none once all lengths were seen."""

from __future__ import annotations

import threading
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import sparse_ref_attn as sra
from tests.contract.state import kinds, state
from tests.contract.test_compile import LIMIT, Counting, fresh_compiler  # noqa: F401
from tests.pipelines import CASES
from tests.reliability.test_one_transformer import beside

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SETTINGS = {
    "all read": sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Every(2))),
    "ranked": sra.SparseRef("mass", sra.Linear(0.2, 0.6), execute=sra.Cache(refresh=sra.Every(2))),
    "tiles": sra.SparseRef("mass", 0.25, execute=sra.Cache(per="tile", tile=3, cell=3, refresh=sra.Every(2))),
}
ON = {"klein": "ranked", "kontext": "all read", "qwen_edit_plus": "tiles"}
"""One op answers all attention: graphs know nothing of the setting."""
DEEP = {  # more blocks than LIMIT; where a model has two kinds, `test_compile` has the other one
    "klein": {"layers": 5, "single": 0},
    "kontext": {"layers": 0, "single": 5},
    "qwen_edit_plus": {"layers": 5},
}
TWO = {"layers": 0, "single": 2}


@torch._dynamo.config.patch(recompile_limit=LIMIT)
@pytest.mark.parametrize(("name", "setting"), ON.items())
def test_repeated_blocks(name: str, setting: str) -> None:
    case, backend = CASES[name], Counting()
    plain, pipe = case.build(**DEEP[name]), case.build(**DEEP[name])
    sra.patch(plain, SETTINGS[setting])
    case.call(pipe, steps=1)  # a pipeline's first call changes its parts
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    before = state(pipe)
    handle = sra.patch(pipe, SETTINGS[setting])
    blocks, seen = sum(DEEP[name].values()), []

    def note(pipe: Any, step: int, timestep: Any, values: dict) -> dict:
        seen.append((backend.graphs, backend.calls))
        return values

    for first in (0, 3):
        got = case.call(pipe, steps=4, first=first, callback=note)
        np.testing.assert_allclose(got, case.call(plain, steps=4, first=first), atol=1e-5)
        assert kinds(handle) == ["dense" if setting == "all read" else "profile", "cached", "dense", "cached"]
        assert not handle.notes
    graphs, calls = zip(*seen, strict=True)
    measures = {"all read": (), "ranked": (0,), "tiles": (0, 2)}[setting]  # a step that measures runs uncompiled
    assert [n // blocks for n in calls] == list(accumulate(n % 4 not in measures for n in range(8)))
    assert len(set(graphs[3:])) == 1
    assert graphs[-1] <= 2 * next(filter(None, graphs)) + 1  # those of the whole length, and of the short one
    assert not counters["graph_break"]
    handle.remove()
    assert state(pipe) == before


def test_with_gradients_blocks_run_uncompiled() -> None:
    pipe, calls = CASES["klein"].build(), []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(dict(k)), with_kwargs=True)
    CASES["klein"].call(pipe, steps=2)
    hook.remove()
    samples, backend = [], Counting()
    for grad in (False, True):
        model = CASES["klein"].build().transformer.requires_grad_()
        if grad:
            model.compile_repeated_blocks(fullgraph=True, backend=backend)
        handle = sra.patch(model, SETTINGS["all read"])
        handle.begin(steps=2)
        with torch.set_grad_enabled(grad):
            model(**calls[0])
            handle.step(1)
            samples.append(model(**calls[1])[0])
    assert samples[1].requires_grad
    assert not backend.graphs
    torch.testing.assert_close(samples[1].detach(), samples[0], rtol=1e-4, atol=1e-5)


def test_two_models_share_the_backend_and_the_last_takes_it_away() -> None:
    """Two threads in one of them are refused in words, and neither gets a wrong picture.

    Which layer asks is known by the order of the calls, of one call at a time.
    """
    case, found = CASES["klein"], []
    pipes = [case.build(seed=seed, **TWO) for seed in (0, 1)]
    wanted = []
    for pipe in pipes:
        with sra.patched(pipe, SETTINGS["all read"]):
            wanted.append(case.call(pipe, steps=2))
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
    before = [state(pipe) for pipe in pipes]
    handles = [sra.patch(pipe, SETTINGS["all read"]) for pipe in pipes]
    for pipe, image in zip(pipes, wanted, strict=True):
        np.testing.assert_allclose(case.call(pipe, steps=2), image, atol=1e-5)
    handles[0].remove()

    def other() -> None:
        try:
            found.append(case.call(beside(pipes[1]), steps=2))
        except sra.IncompatibleError as error:
            found.append(str(error))

    def within(module: Any, args: Any) -> None:
        if not found:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    with pipes[1].transformer.x_embedder.register_forward_pre_hook(within):
        image = case.call(pipes[1], steps=2)
    np.testing.assert_allclose(image, wanted[1], atol=1e-5)
    assert "must be in one call at a time, got calls of two threads" in found[0]
    np.testing.assert_allclose(case.call(pipes[1], steps=2), wanted[1], atol=1e-5)
    handles[1].remove()
    assert [state(pipe) for pipe in pipes] == before
