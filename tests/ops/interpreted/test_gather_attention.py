"""The attention kernels themselves, interpreted, against float64: a grid, a fuzz of ragged shapes, poisoned memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.functional import gather_attention
from sparse_ref_attn.ops.gather_attention.arguments import Arguments
from sparse_ref_attn.ops.gather_attention.gradients import Wanted
from sparse_ref_attn.ops.gather_attention.impl import triton_backend
from sparse_ref_attn.ops.gather_attention.normal_form import normalise
from sparse_ref_attn.ops.shared.launch_config import Config

from ..guards import Canaries, in_nan
from ..problems import NAMES, Problem, gradients, grid, make, ragged, truth
from ..problems import grad_out as weights
from ..rounding import assert_rounded, of_attention, of_lse
from ..tolerance import assert_as_accurate

SMALL = Config(32, 32, 4, 2)  # so that small problems have many tiles
ONE_LOOP = Config(16, 32, 4, 2, split=False)

PROBLEMS = {
    **grid(32),
    "empty items": make(((3, 0, 33),), ((0, 4, 0),), (0, 2, 33), 40, heads=1, channels=64),
    "head dim 128": make(((40,),), ((33,),), (34,), 50, heads=1, channels=128),
}


def arguments(problem: Problem, distinct: bool = False) -> Arguments:
    operands = [problem.operands.get(n) for n in NAMES]
    layout = [problem.layout.get(n) for n in ("ref_indices", "ref_offsets", "cu_seqlens_q", "cu_seqlens_k")]
    return normalise(*operands, *layout, None, distinct)


def check(problem: Problem, dtype: torch.dtype, config: Config, *, distinct: bool = False, through_lse: bool = True):
    """Kernels between canaries on operands in NaN, results as accurate as their precision allows."""
    low = problem.to(dtype)
    exact = low.to(torch.float64).leaves()
    out, lse = truth(exact)
    grad_out = weights(out.to(dtype))
    grad_lse = weights(lse.float(), 2) if through_lse else None

    def loss(o: Tensor, total: Tensor) -> Tensor:
        value = (o * grad_out.to(o)).sum()
        return value if grad_lse is None else value + (torch.where(total.isinf(), 0.0, total) * grad_lse.to(o)).sum()

    def grads_of(p: Problem, o: Tensor, total: Tensor) -> dict[str, Tensor]:
        value = loss(o, total)
        leaves = list(p.operands.values())
        got = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(p.operands.items(), got, strict=True)}

    want = grads_of(exact, out, lse)
    plain = low.leaves()
    plain_out, plain_lse = plain.run("reference")
    allowed = grads_of(plain, plain_out, plain_lse)
    poisoned = Problem({n: in_nan(x) for n, x in low.operands.items()}, low.layout)
    with Canaries():
        a = arguments(poisoned, distinct)
        got_out, got_lse = triton_backend.forward(a, config)
        got = triton_backend.backward(
            a, in_nan(grad_out), grad_lse, got_out, got_lse, Wanted(True, True, True), (config, config)
        )
    deviations = of_attention(low, grad_out, grad_lse) if dtype == torch.float32 else {"lse": of_lse(low)}
    assert_rounded(got_lse, lse.detach(), deviations["lse"], "lse")  # float32 whatever the operands are

    def compare(actual: Tensor, exactly: Tensor, plainly: Tensor, name: str) -> None:
        if dtype == torch.float32:
            assert_rounded(actual, exactly, deviations[name], name)
        else:
            assert_as_accurate(actual, exactly, plainly, name)

    compare(got_out, out.detach(), plain_out.detach(), "out")
    for name, grad in zip(NAMES, got, strict=True):
        assert (grad is None) == (name not in want)
        if grad is not None:
            assert grad.dtype == dtype
            compare(grad, want[name], allowed[name], name)


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_kernels_are_the_formula(name: str) -> None:
    check(PROBLEMS[name], torch.float32, SMALL)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ragged items, one bank", torch.float16),
        ("two dense tensors, grouped heads", torch.bfloat16),
        *itertools.product(["rows named twice", "head dim 128"], [torch.float16, torch.bfloat16]),
    ],
)
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(name: str, dtype: torch.dtype) -> None:
    check(PROBLEMS[name], dtype, SMALL)


@pytest.mark.parametrize("name", ["ragged items, one bank", "text and image rows apart", "a selection per key head"])
def test_one_loop_with_a_mask_is_the_same(name: str) -> None:
    check(PROBLEMS[name], torch.bfloat16, ONE_LOOP, through_lse=False)


def test_distinct_rows_are_stored_straight_into_the_bank() -> None:
    base = make(((33, 3),), ((4, 2),), (4, 0), 40, channels=32)
    layout = {
        **base.layout,
        "ref_indices": torch.randperm(40, generator=torch.Generator().manual_seed(0))[:37],
        "ref_offsets": torch.tensor([[0, 4, 37]]),
    }
    check(Problem(base.operands, layout), torch.float32, SMALL, distinct=True)
    per_head = {**layout, "ref_offsets": torch.tensor([[0, 33, 33], [33, 34, 37]])}
    check(Problem(base.operands, per_head), torch.float32, SMALL, distinct=True)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    problem=ragged(st.integers(0, 36), 40, st.just(32)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    config=st.sampled_from([SMALL, ONE_LOOP]),
)
def test_fuzz_of_ragged_shapes(problem: Problem, dtype: torch.dtype, config: Config) -> None:
    check(problem, dtype, config)


def test_the_public_function_in_the_shipped_configuration() -> None:
    problem = make(((130, 3),), ((65, 2),), (65, 4), 70, heads=1, channels=64).to(torch.bfloat16)
    kernel, dense = problem.leaves(), problem.leaves()
    exact = problem.to(torch.float64).leaves()
    got, want, low = (gradients(p, *p.run(b)) for p, b in ((kernel, "triton"), (exact, "sdpa"), (dense, "reference")))
    for name in want:
        assert_as_accurate(got[name], want[name], low[name], name)


def test_the_same_bits_every_time() -> None:
    problem = PROBLEMS["rows named twice"].to(torch.bfloat16)
    first, second = ([*p.run("triton"), *gradients(p, *p.run("triton")).values()] for p in (problem.leaves(),) * 2)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 48}, "needs a head dim of 32, 64 or 128, got 48"),
        ({"dtype": torch.float64}, "needs float16 or bfloat16"),
        ({"gap": 3}, "multiple of 16 bytes"),
        ({"gap": 8}, "strides of multiples of 16 elements"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(changes: dict[str, object], message: str) -> None:
    x = torch.zeros(4, 2, changes.get("channels", 32), dtype=changes.get("dtype", torch.bfloat16))
    q = in_nan(x, changes["gap"]) if "gap" in changes else x
    with pytest.raises(ConfigError, match=message):
        gather_attention(q, x, x, backend="triton")
