"""The kernel of query tiles, interpreted, against float64: a grid, a fuzz of ragged tiles, poisoned memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.ops.gather_attention.impl import triton_backend, triton_tiles
from sparse_ref_attn.ops.gather_attention.impl.triton_tiles import block_of
from sparse_ref_attn.ops.gather_attention.normal_form import normalise
from sparse_ref_attn.ops.shared.launch_config import Config

from ..guards import Canaries, in_nan
from ..problems import NAMES, Problem, truth
from ..rounding import assert_rounded, of_attention, of_lse
from ..tile_problems import make_tiles, ragged_tiles, tile_grid
from ..tolerance import assert_as_accurate

SHARED = Config(32, 32, 4, 2)
SMALL = Config(16, 32, 4, 2)  # so that small problems have many blocks
ONE_LOOP = Config(32, 32, 4, 2, split=False)
PROBLEMS = tile_grid(32)


def check(problem: Problem, dtype: torch.dtype, config: Config) -> None:
    """The kernels between canaries on operands in NaN, results as accurate as their precision allows."""
    low = problem.to(dtype)
    out, lse = truth(low.to(torch.float64))
    layout = dict(low.layout)
    if "bias" in layout:
        layout["bias"] = in_nan(layout["bias"], 1)
    operands = {n: in_nan(x) for n, x in low.operands.items()}
    names = ("ref_indices", "ref_offsets", "cu_seqlens_q", "cu_seqlens_k")
    with Canaries():
        a = normalise(
            *(operands.get(n) for n in NAMES), *(layout.get(n) for n in names), None, False, None,
            layout["cu_tiles"], layout.get("bias"),
        )  # fmt: skip
        got_out, got_lse = triton_backend.forward(a, SHARED, config)
    deviations = of_attention(low) if dtype == torch.float32 else {"lse": of_lse(low)}
    assert got_out.dtype == dtype
    assert_rounded(got_lse, lse, deviations["lse"], "lse")  # float32 whatever the operands are
    if dtype == torch.float32:
        assert_rounded(got_out, out, deviations["out"], "out")
    else:
        assert_as_accurate(got_out, out, low.run("reference")[0], "out")


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_kernels_are_the_formula(name: str) -> None:
    check(PROBLEMS[name], torch.float32, SMALL)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ragged tiles of ragged items", torch.float16),
        ("biased rows of parts and grouped heads", torch.bfloat16),
        ("means alone", torch.float16),
        ("means alone", torch.bfloat16),
    ],
)
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(name: str, dtype: torch.dtype) -> None:
    check(PROBLEMS[name], dtype, SMALL)


@pytest.mark.parametrize("channels", [64, 128])
def test_one_loop_with_a_mask_and_other_head_dims(channels: int) -> None:
    problem = make_tiles(((16, 33),), ((35,),), (34, 5), 40, means=(33,), heads=1, channels=channels)
    check(problem, torch.bfloat16, ONE_LOOP)


def test_more_tiles_than_a_program_looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "MOST_SLOTS", 4)
    check(PROBLEMS["empty tiles and items"], torch.bfloat16, SMALL)
    check(PROBLEMS["ragged tiles of ragged items"], torch.bfloat16, SMALL)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    problem=ragged_tiles(st.integers(0, 36), 40, st.just(32)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    config=st.sampled_from([SMALL, ONE_LOOP]),
)
def test_fuzz_of_ragged_tiles(problem: Problem, dtype: torch.dtype, config: Config) -> None:
    check(problem, dtype, config)


@pytest.mark.parametrize("lengths", [(16, 16, 7), (64, 64, 30)])
def test_the_public_function_in_the_shipped_configuration(lengths: tuple[int, ...]) -> None:
    problem = make_tiles((lengths,), ((70,),), (66, 5, 9), 80, means=(5,), heads=1, channels=64).to(torch.bfloat16)
    exact, low = truth(problem.to(torch.float64)), problem.run("reference")
    first, second = problem.run("triton"), problem.run("triton")
    for got, again, want, plain in zip(first, second, exact, low, strict=True):
        assert torch.equal(got, again)
        assert_as_accurate(got, want, plain)


def test_blocks_are_as_large_as_the_mean_tile() -> None:
    def block(lengths: tuple[int, ...]) -> int:
        problem = make_tiles((lengths,), ((1,),), (1,) * len(lengths), 1)
        layout = [problem.layout[n] for n in ("ref_indices", "ref_offsets", "cu_seqlens_q", "cu_seqlens_k")]
        operands = [problem.operands.get(n) for n in NAMES]
        return block_of(normalise(*operands, *layout, None, False, None, problem.layout["cu_tiles"]))

    assert [block(x) for x in ((16,) * 8, (128, *[16] * 8), (64, 64), (256,), (1,))] == [16, 16, 64, 64, 16]


def test_gradients_are_refused() -> None:
    problem = PROBLEMS["tiles alike"].to(torch.bfloat16).leaves()
    with pytest.raises(ConfigError, match="through cu_tiles"):
        problem.run("triton")
