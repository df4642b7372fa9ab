"""The attention kernel of csrc, emulated, against float64: the Triton kernels' grid and fuzz, and its promises."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ref_attn.functional import gather_attention
from sparse_ref_attn.ops.gather_attention.arguments import Arguments
from sparse_ref_attn.ops.gather_attention.impl.cuda import forward
from sparse_ref_attn.ops.gather_attention.normal_form import normalise

from ..ops.guards import Canaries, in_nan
from ..ops.problems import NAMES, Problem, grid, make, ragged, tiling, truth
from ..ops.rounding import assert_rounded, of_lse
from ..ops.tolerance import assert_as_accurate
from ..pairwise import pairwise
from .emulated import EARLY, LATE, MIXED, emulated, shipped

HALF = [torch.float16, torch.bfloat16]
SCHEDULES = [(1, EARLY), (2, LATE), (3, MIXED)]
PROBLEMS = {
    **grid(64),
    "several tiles of queries and keys": make(((129, 65),), ((130, 65),), (129, 64), 140, heads=1, channels=64),
    "head dim 128": make(((129, 3),), ((65, 1),), (130, 0), 140, heads=2, key_heads=1, channels=128),
    "head dim 128, text and image rows apart": make(
        ((2, 33), (129, 5)), ((3, 33), (130, 6)), (34, 66), 70, heads=1, channels=128
    ),
}


def arguments(problem: Problem) -> Arguments:
    operands = [problem.operands.get(n) for n in NAMES]
    layout = [problem.layout.get(n) for n in ("ref_indices", "ref_offsets", "cu_seqlens_q", "cu_seqlens_k")]
    return normalise(*operands, *layout, problem.options.get("scale"), False)


def compare(problem: Problem, got: Tensor, got_lse: Tensor) -> None:
    """As accurate as PyTorch in the same precision."""
    out, lse = truth(problem.to(torch.float64))
    plain, plain_lse = problem.run("reference")
    assert_as_accurate(got, out, plain, "out")
    assert_as_accurate(got_lse, lse, plain_lse, "lse")


def check(problem: Problem, dtype: torch.dtype, seed: int = 1, copies: int = MIXED) -> Tensor:
    """Between canaries, operands in NaN; returns the LSE."""
    low = problem.to(dtype)
    poisoned = Problem({n: in_nan(x) for n, x in low.operands.items()}, low.layout, low.options)
    with emulated(shipped(), seed, copies) as library, Canaries():
        got, got_lse = forward(arguments(poisoned))
    assert library.count("bank conflict") == 0
    compare(low, got, got_lse)
    return got_lse


@cache
def rounded_lse(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The LSE in float64, and what rounding in float32 does to it."""
    low = PROBLEMS[name].to(dtype)
    return truth(low.to(torch.float64))[1], of_lse(low)


@pairwise(name=list(PROBLEMS), dtype=HALF, schedule=SCHEDULES)
def test_errs_at_most_twice_as_much_as_pytorch(name: str, dtype: torch.dtype, schedule: tuple[int, int]) -> None:
    got_lse = check(PROBLEMS[name], dtype, *schedule)
    assert_rounded(got_lse, *rounded_lse(name, dtype), "lse")  # float32 all the way


lengths = st.one_of(st.integers(0, 40), st.integers(41, 200))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    problem=ragged(lengths, 205, st.sampled_from([64, 128])),
    dtype=st.sampled_from(HALF),
    seed=st.integers(0, 9),
    copies=st.integers(0, 2),
)
def test_fuzz_of_ragged_shapes(problem: Problem, dtype: torch.dtype, seed: int, copies: int) -> None:
    check(problem, dtype, seed, copies)


def test_the_same_bits_under_every_schedule() -> None:
    a = arguments(PROBLEMS["several tiles of queries and keys"].to(torch.bfloat16))
    results = []
    for seed in range(6):
        with emulated(shipped(), seed, seed % 3):
            results.append(forward(a))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_an_item_does_not_depend_on_its_neighbours() -> None:
    problem = make(((70, 40),), ((66, 17),), (33, 20), 90, channels=64).to(torch.float16)
    changed = {n: x.clone() for n, x in problem.operands.items()}
    for name, start in {"q": 70, "k": 66, "v": 66}.items():
        changed[name][start:] *= -3
    with emulated(shipped()):
        out, lse = forward(arguments(problem))
        other, other_lse = forward(arguments(Problem(changed, problem.layout)))
    assert torch.equal(out[:70], other[:70])
    assert torch.equal(lse[:, :70], other_lse[:, :70])
    assert not torch.allclose(out[70:], other[70:])


def test_dropped_rows_are_never_read() -> None:
    problem = make(((35,),), ((20,),), (50,), 90, channels=64).to(torch.float16)
    dropped = torch.ones(90, dtype=torch.bool)
    dropped[problem.layout["ref_indices"].long()] = False
    with emulated(shipped()):
        out, lse = forward(arguments(problem))
        for name in ("k_ref", "v_ref"):
            problem.operands[name][dropped] = float("nan")
        again, again_lse = forward(arguments(problem))
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)


def test_64_bit_indices_and_offsets_are_the_same() -> None:
    problem = PROBLEMS["a selection per key head"].to(torch.float16)
    wide = Problem(problem.operands, {n: x.long() for n, x in problem.layout.items()})
    with emulated(shipped()):
        (out, lse), (other, other_lse) = (forward(arguments(p)) for p in (problem, wide))
    assert torch.equal(out, other)
    assert torch.equal(lse, other_lse)


@pytest.mark.parametrize("name", ["q", "k", "v", "k_ref", "v_ref"])
def test_rows_far_apart_need_int64_offsets(name: str) -> None:
    problem = make(((3,),), ((3,),), (2,), 3, heads=1, channels=64).to(torch.float16)
    flat = torch.empty(2 * 2**30 + 64, dtype=torch.float16)  # virtual memory, hardly any of it touched
    far = flat.as_strided((3, 1, 64), (2**30, 64, 1))
    far.copy_(problem.operands[name])
    apart = Problem({**problem.operands, name: far}, {**problem.layout, "ref_indices": torch.tensor([2, 0])})
    near = Problem(problem.operands, apart.layout)
    with emulated(shipped()):
        (out, lse), (want, want_lse) = (forward(arguments(p)) for p in (apart, near))
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_any_scale_and_large_scores() -> None:
    problem = make(((33,),), ((70,),), (65,), 80, heads=1, channels=64)
    problem.operands["q"] *= 20
    check(Problem(problem.operands, problem.layout, {"scale": 0.5}), torch.float16)
    check(Problem(problem.operands, problem.layout, {"scale": 1e-3}), torch.bfloat16)


def test_the_public_function_and_batched_operands() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 64, generator=generator).to(torch.bfloat16) for n in (35, 75, 75))
    kept = torch.arange(80).view(2, 40)

    def run(*x: torch.Tensor, backend: str) -> torch.Tensor:
        return gather_attention(x[0], x[1][:, :35], x[2][:, :35], x[1][:, 35:], x[2][:, 35:], kept, backend=backend)

    with emulated(shipped()):
        got = run(q, k, v, backend="cuda")
    exact = run(q.double(), k.double(), v.double(), backend="reference")
    assert_as_accurate(got, exact, run(q, k, v, backend="reference"), "out")


def test_what_ran_is_what_was_meant() -> None:
    """Tensor cores for every product, 16-byte copies for every row, one barrier a tile."""
    problem = make(((128,),), ((128,),), (64,), 70, heads=1, channels=64).to(torch.float16)
    with emulated(shipped()) as library:
        forward(arguments(problem))
    tiles = 3
    assert library.count("mma") == tiles * 2 * 128 * 64 * 64 // (16 * 8 * 16)
    assert library.count("cp.async") == (128 + tiles * 2 * 64) * 64 * 2 // 16
    assert library.count("barrier") == tiles


def test_more_items_than_a_warp_has_lanes() -> None:
    lengths = tuple(n % 5 for n in range(70))
    problem = make((lengths,), (lengths[::-1],), tuple(n % 3 for n in range(70)), 9, heads=1, channels=64)
    assert problem.layout["cu_seqlens_q"].equal(tiling((lengths,)))
    check(problem, torch.float16)
