"""The interpreter itself: bf16 is right once mended, and the guards see what they are there for."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ..guards import Canaries, in_nan
from ..rounding import assert_rounded, of_product


@triton.jit
def _product(X, Y, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + i[None, :])
    y = tl.load(Y + i[:, None] * N + i[None, :])
    tl.store(Z + i[:, None] * N + i[None, :], tl.dot(x, y))


@triton.jit
def _copy(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


@triton.jit
def _half_sum(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Y + i, x * 0.5 + x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dot_multiplies_numbers_not_bit_patterns(dtype: torch.dtype):
    # Unmended, bf16 is off by 1e10.
    x, y = torch.randn(2, 32, 32).to(dtype)
    z = torch.empty(32, 32)
    _product[(1,)](x, y, z, N=32)
    truth = x.double() @ y.double()
    deviation = of_product(x, y)  # float32 whatever the operands are
    assert_rounded(z, truth, deviation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_round_to_nearest_even(dtype: torch.dtype):
    x = torch.cat([torch.randn(1020), torch.tensor([1.999, float("inf"), -float("inf"), 1 + 2**-8])])
    y = torch.empty(1024, dtype=dtype)
    _copy[(1,)](x, y, N=1024)
    assert torch.equal(y, x.to(dtype))
    back = torch.empty(1024)
    _copy[(1,)](y, back, N=1024)
    assert torch.equal(back, y.float())


def test_bf16_arithmetic_rounds_like_torch():
    x = torch.randn(1024).bfloat16()
    y = torch.empty_like(x)
    _half_sum[(1,)](x, y, N=1024)
    assert torch.equal(y, x * 0.5 + x)


def test_a_store_past_the_end_is_seen():
    def overrun() -> None:
        with Canaries():
            y = torch.empty(32)
            _copy[(1,)](torch.ones(64), y, N=64)

    with pytest.raises(AssertionError, match="128 bytes written after the tensor of empty"):
        overrun()


def test_an_empty_tensor_is_poisoned_and_a_zero_one_is_not():
    with Canaries():
        assert torch.empty(2, 3).isnan().all()
        assert torch.equal(torch.ones(2).new_zeros(3), torch.zeros(3))


def test_nan_surrounds_every_row():
    x = torch.randn(2, 3, 4, 16)
    y = in_nan(x)
    assert torch.equal(x, y)
    assert y.stride() == (288, 96, 24, 1)
    assert y.as_strided((2, 3, 4, 24), y.stride(), y.storage_offset())[..., 16:].isnan().all()
