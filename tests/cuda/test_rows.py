"""The row copies of csrc, emulated: bit for bit what index_select does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ref_attn.errors import KernelError
from sparse_ref_attn.functional import pack_rows, unpack_rows
from sparse_ref_attn.ops.pack_rows.cuda import launch_pack, launch_unpack

from ..ops.guards import Canaries, in_nan
from .emulated import emulated, shipped

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return (3 * x).to(dtype)


def both_ways(x: list[Tensor], rows: Tensor, dim: int) -> None:
    with emulated(shipped(), seed=int(rows.numel())), Canaries():
        packed = launch_pack(x, rows, dim)
        back = launch_unpack(packed, rows, x[0].shape[dim], dim)
    for full, kept, again in zip(x, packed, back, strict=True):
        expected = full.index_select(dim, rows)
        assert torch.equal(kept, expected)
        assert kept.dtype == full.dtype
        zeros = torch.zeros_like(full, memory_format=torch.contiguous_format)
        assert torch.equal(again, zeros.index_copy(dim, rows.long(), expected))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128])
def test_any_dtype(dtype: torch.dtype) -> None:
    both_ways([draw((2, 9, 5), dtype)], torch.tensor([8, 0, 3]), 1)


@pytest.mark.parametrize("kept", [0, 1, 63, 100, 129])
@pytest.mark.parametrize("inner", [1, 63, 129, 1030])
def test_odd_sizes(kept: int, inner: int) -> None:
    rows = torch.randperm(129, generator=torch.Generator().manual_seed(kept))[:kept]
    both_ways([draw((2, 129, inner), torch.float16)], rows, 1)


@pytest.mark.parametrize(
    ("shape", "dim"), [((9,), 0), ((9, 4), 0), ((2, 9), 1), ((2, 3, 9, 4), 2), ((2, 9, 3, 4), 1), ((2, 3, 4, 9), 3)]
)
def test_any_axis(shape: tuple[int, ...], dim: int) -> None:
    both_ways([draw(shape)], torch.tensor([1, 2, 8], dtype=torch.int32), dim)


def test_any_strides() -> None:
    rows = torch.tensor([5, 2])
    both_ways([in_nan(draw((2, 6, 3, 16)), gap=3)], rows, 1)
    both_ways([draw((2, 5, 6)).transpose(1, 2)], rows, 1)
    both_ways([draw((2, 12, 5))[:, ::2]], rows, 1)
    both_ways([draw((1, 6, 5)).expand(3, 6, 5)], rows, 1)
    both_ways([draw((2, 3, 6, 4, 5)).permute(4, 1, 2, 0, 3)], rows, 2)


def test_more_tensors_than_one_launch_takes() -> None:
    shapes = [(2, 9, n, 1 + n % 3) for n in range(1, 40)]
    both_ways([draw(shape, DTYPES[n % len(DTYPES)]) for n, shape in enumerate(shapes)], torch.tensor([8, 1, 4]), 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    outer=st.integers(0, 3),
    size=st.integers(1, 140),
    inner=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    data=st.data(),
)
def test_any_shape(outer: int, size: int, inner: list[int], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size))
    x = [in_nan(draw((outer, size, n), torch.float16), gap=1) for n in inner]
    both_ways(x, torch.tensor(rows, dtype=torch.int64), 1)


def test_gradients_through_the_public_functions() -> None:
    rows = torch.tensor([4, 0])
    x = draw((2, 6, 3)).requires_grad_()
    weight = draw((2, 6, 3)) + 1
    with emulated(shipped()):
        packed = pack_rows(x, rows, backend="cuda")
        (grad,) = torch.autograd.grad((unpack_rows(packed, rows, 6, backend="cuda") * weight).sum(), x)
    expected = torch.zeros_like(grad)
    expected[:, rows] = weight[:, rows]
    assert torch.equal(grad, expected)


def test_rows_outside_touch_nothing() -> None:
    x = in_nan(draw((1, 4, 16)), gap=16)
    with emulated(shipped()), Canaries():
        (packed,) = launch_pack([x], torch.tensor([-1, 2, 4]), 1)
        (back,) = launch_unpack([torch.ones(1, 3, 16)], torch.tensor([-1, 2, 4]), 4, 1)
    assert torch.equal(packed[:, 1], x[:, 2])
    assert (packed[:, [0, 2]] == 0).all()
    assert torch.equal(back.sum(-1), torch.tensor([[0.0, 0.0, 16.0, 0.0]]))


def test_rows_far_apart_need_int64_offsets() -> None:
    flat = torch.empty(2**31 + 64, dtype=torch.float16)  # virtual memory, hardly any of it touched
    far = flat.as_strided((1, 3, 32), (0, 2**30, 1))
    far.copy_(draw((1, 3, 32)))
    with emulated(shipped()), Canaries():
        (packed,) = launch_pack([far], torch.tensor([2, 0]), 1)
    assert torch.equal(packed, far[:, [2, 0]])


def test_a_row_named_twice_is_a_race() -> None:
    """Two threads write one place: rows must be distinct, and the emulator tells."""
    with emulated(shipped()), pytest.raises(KernelError, match=r"race: global memory at .* is written"):
        launch_unpack([torch.ones(1, 3, 16)], torch.tensor([1, 2, 1]), 4, 1)


def test_16_bytes_at_a_time_where_the_layout_allows_it() -> None:
    x = draw((2, 9, 64), torch.float16)
    with emulated(shipped()) as library:
        launch_pack([x], torch.tensor([1, 5, 7]), 1)
        assert library.count("global bytes read") == 6 * 128 + 8 * 6 * 8  # each thread reads its row number
