"""Selections of query tiles on a card: float64 truth, the same bits every time, no wait for the device."""

from __future__ import annotations

import pytest
import torch

from ..ops.problems import Problem, truth
from ..ops.tile_problems import make_tiles
from ..ops.tolerance import assert_as_accurate
from .kernels import require

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

PROBLEMS = {
    "tiles of 16": make_tiles(((100, *[16] * 20),), ((420,),), (130,) * 21, 300, means=(40,), heads=4, channels=128),
    "tiles of 64": make_tiles(((100, *[64] * 6),), ((484,),), (130,) * 7, 300, means=(40,), heads=4, channels=128),
    "ragged tiles of ragged items": make_tiles(
        ((7, 133, 1), (16,), (2, 140)), ((140, 2, 35),), (133, 0, 170, 5, 1, 36), 180, means=(134, 3, 0), channels=64
    ),
    "biased rows of parts and grouped heads": make_tiles(
        (((2,), (133,)), ((16, 224), (5, 1))), ((3, 135),), (134, 4, 9, 0, 2, 70), 150, means=(20, 80),
        heads=4, key_heads=2, channels=32,
    ),
    "a selection per key head": make_tiles(
        ((116, 5), (33,)), ((3, 102),), ((134, 0, 4), (3, 90, 0)), 140, means=(7, 3), heads=4, key_heads=2, channels=64
    ),
    "bank alone": make_tiles(((4, 133), (2,)), None, (0, 130, 5), 140, channels=128),
}  # fmt: skip


def on_card(name: str, dtype: torch.dtype) -> Problem:
    return PROBLEMS[name].to(dtype).to(device=DEVICE)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_as_accurate_as_pytorch_and_the_same_bits(name: str, dtype: torch.dtype, backend: str) -> None:
    require(backend)
    problem = on_card(name, dtype)
    exact = truth(PROBLEMS[name].to(dtype).to(torch.float64))
    first, second, low = problem.run(backend), problem.run(backend), problem.run("reference")
    for got, again, want, plain in zip(first, second, exact, low, strict=True):
        assert torch.equal(got, again)
        assert_as_accurate(got.cpu(), want, plain.cpu())


def test_a_cuda_graph_holds_it() -> None:
    require("triton")
    problem = on_card("tiles of 16", torch.bfloat16)
    want = problem.run("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = problem.run("triton")
    graph.replay()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
