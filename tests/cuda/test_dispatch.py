"""gather_attention and attention_mass with `backend="cuda"`, from the public door to the emulated kernels and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.functional import attention_mass, attention_mass_varlen, gather_attention
from sparse_ref_attn.ops.attention_mass.reference import attention_mass_reference

from ..ops.guards import in_nan
from ..ops.problems import Problem, grid, make, truth
from ..ops.tolerance import assert_as_accurate
from ..pairwise import pairwise
from .emulated import emulated, shipped

DTYPES = [torch.float16, torch.bfloat16]
PROBLEMS = {
    **grid(64),
    "more tiles than stages": make(((130,),), ((260,),), (300,), 310, channels=128, heads=1),
    "head dim 128": make(((40,),), ((33,),), (34,), 50, heads=1, channels=128),
}


@pytest.fixture(autouse=True)
def emulator() -> Iterator[None]:
    with emulated(shipped()):
        yield


def check(problem: Problem, dtype: torch.dtype, gap: int = 8) -> None:
    rounded = problem.to(dtype)
    want = truth(rounded.to(torch.float64))
    low = rounded.run("reference")
    poisoned = {n: in_nan(x, gap) for n, x in rounded.operands.items()}
    out, lse = Problem(poisoned, rounded.layout, rounded.options).run("cuda")
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_as_accurate(out, want[0], low[0], "out")
    assert_as_accurate(lse, want[1], low[1], "lse")


# -- gather_attention ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), list(zip(PROBLEMS, itertools.cycle(DTYPES), strict=False)))
def test_output_and_lse(name: str, dtype: torch.dtype) -> None:
    check(PROBLEMS[name], dtype)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_both_kinds_of_integers(kind: torch.dtype) -> None:
    problem = PROBLEMS["two dense tensors, grouped heads"]
    check(Problem(problem.operands, {n: x.to(kind) for n, x in problem.layout.items()}), torch.bfloat16)


def test_batched_operands_and_a_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 64, generator=generator).half() for n in (33, 20, 20))
    bank = torch.randn(50, 2, 64, generator=generator).half()
    rows = torch.randperm(50, generator=generator)[:24].view(2, 12)
    got = gather_attention(q, k, v, bank, bank, rows, scale=0.05, return_lse=True, backend="cuda")
    exact = [x.double() for x in (q, k, v, bank, bank)]
    want = gather_attention(*exact, rows, scale=0.05, return_lse=True, backend="reference")
    low = gather_attention(q, k, v, bank, bank, rows, scale=0.05, return_lse=True, backend="reference")
    for one, expected, roughly in zip(got, want, low, strict=True):
        assert_as_accurate(one, expected, roughly)


def test_no_queries() -> None:
    q, k = torch.zeros(0, 2, 64, dtype=torch.float16), torch.zeros(3, 2, 64, dtype=torch.float16)
    out, lse = gather_attention(q, k, k, return_lse=True, backend="cuda")
    assert out.shape == (0, 2, 64)
    assert lse.shape == (2, 0)


def test_the_backward_is_tritons_and_the_dispatch_says_so() -> None:
    problem = PROBLEMS["head dim 128"].to(torch.float16).leaves()
    with pytest.raises(ConfigError, match=r"cuda: leaves the backward to triton, which needs a CUDA device, got cpu"):
        problem.run("cuda")


def test_bad_values_are_refused_before_any_kernel() -> None:
    problem = PROBLEMS["one token"].to(torch.float16)
    layout = {**problem.layout, "ref_indices": torch.tensor([7], dtype=torch.int32)}
    with pytest.raises(LayoutError, match=r"lie in \[0, 1\), got values from 7 to 7"):
        Problem(problem.operands, layout).run("cuda")


def test_what_a_launch_cannot_hold_is_refused_in_words() -> None:
    x = torch.zeros(1, 65_537, 64, dtype=torch.float16)
    with pytest.raises(LayoutError, match=r"sra_gather_attention: heads must lie between 1 and 65535, got 65537"):
        gather_attention(x, x, x, backend="cuda")


# -- attention_mass --------------------------------------------------------------------------


def draw(queries: int, keys: int, C: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    q, k = (2 * torch.randn(batch, n, 2, C, generator=generator) for n in (queries, keys))
    return in_nan(q.to(dtype)), in_nan(k.to(dtype))


def check_mass(mass: Tensor, q: Tensor, k: Tensor, span: tuple[int, int], mask: Tensor | None = None) -> None:
    scale = q.shape[-1] ** -0.5
    exact = attention_mass_reference(q.double(), k.double(), span, scale, mask)
    assert_as_accurate(mass, exact, attention_mass_reference(q, k, span, scale, mask))


@pairwise(sizes=[(1, 63, 62), (63, 100, 0), (129, 65, 64), (100, 300, 77)], C=[64, 128], dtype=DTYPES)
def test_mass(sizes: tuple[int, int, int], C: int, dtype: torch.dtype) -> None:
    queries, keys, start = sizes
    q, k = draw(queries, keys, C, dtype)
    check_mass(attention_mass(q, k, (start, keys), backend="cuda"), q, k, (start, keys))
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[:, -1] = True
    check_mass(attention_mass(q, k, (start, keys), key_mask=mask, backend="cuda"), q, k, (start, keys), mask)
    check_mass(attention_mass(q, k, (start, keys), query_stride=3, backend="cuda"), q[:, ::3], k, (start, keys))


def test_mass_of_a_span_inside_with_an_lse_and_values() -> None:
    q, k = draw(70, 90, 64, torch.float16)
    lse = torch.einsum("bnhc,bshc->bhns", q.float(), k.float()).mul(64**-0.5).logsumexp(-1)
    span = (13, 57)
    for given_lse in (lse, lse.transpose(1, 2).contiguous().transpose(1, 2)):
        check_mass(attention_mass(q, k, span, lse=given_lse, backend="cuda"), q, k, span)
    for options in ({"value": k}, {"reduce_heads": True}):
        mine = attention_mass(q, k, span, backend="cuda", **options)
        theirs = attention_mass(q, k, span, backend="chunked", **options)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("stride", [1, 4])
def test_ragged_mass(stride: int) -> None:
    items = [(40, 50, 27), (0, 5, 3), (64, 128, 128), (1, 63, 0), (129, 100, 1)]  # queries, keys, references
    counts = torch.tensor(items)
    offsets = torch.cat([torch.zeros(1, 3, dtype=torch.long), counts.cumsum(0)]).t().to(torch.int32).contiguous()
    starts = (offsets[1, 1:] - counts[:, 2]).to(torch.int32)
    rows, keys, refs = offsets[:, -1].tolist()
    q, k = draw(rows, keys, 64, torch.bfloat16, batch=1)
    mass = attention_mass_varlen(q[0], k[0], *offsets, starts, refs, query_stride=stride, backend="cuda")
    for item, (n, s, r) in enumerate(items):
        at = offsets[:, item].tolist()
        mine = mass[None, :, at[2] : at[2] + r]
        if n and r:
            check_mass(mine, q[:, at[0] : at[0] + n : stride], k[:, at[1] : at[1] + s], (s - r, s))
        else:
            assert not mine.any()


def test_a_mass_that_a_launch_cannot_hold_is_refused_in_words() -> None:
    x = torch.zeros(65_536, 1, 1, 64, dtype=torch.float16)
    with pytest.raises(LayoutError, match=r"sra_attention_lse: items must lie between 0 and 65535, got 65536"):
        attention_mass(x, x, (0, 1), backend="cuda")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_scales_without_a_kernel(scale: float) -> None:
    q, k = draw(3, 4, 64, torch.float16)
    with pytest.raises(ConfigError, match=r"cuda: needs scale > 0"):
        attention_mass(q, k, (0, 4), scale=scale, backend="cuda")
