"""What the row copies promise, whoever makes them: bit for bit what index_select does."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ref_attn.functional import pack_rows, unpack_rows

from .guards import Canaries, in_nan

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return (3 * x).to(dtype)


class RowCopies:
    """Subclasses say who copies."""

    backend: str
    pack: Any
    unpack: Any

    def running(self, seed: int = 1) -> AbstractContextManager[Any]:
        """Where the copies run."""
        raise NotImplementedError

    def both_ways(self, x: list[Tensor], rows: Tensor, dim: int) -> None:
        with self.running(int(rows.numel())), Canaries():
            packed = self.pack(x, rows, dim)
            back = self.unpack(packed, rows, x[0].shape[dim], dim)
        for full, kept, again in zip(x, packed, back, strict=True):
            expected = full.index_select(dim, rows)
            assert torch.equal(kept, expected)
            assert kept.dtype == full.dtype
            zeros = torch.zeros_like(full, memory_format=torch.contiguous_format)
            assert torch.equal(again, zeros.index_copy(dim, rows.long(), expected))

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128])
    def test_any_dtype(self, dtype: torch.dtype) -> None:
        self.both_ways([draw((2, 9, 5), dtype)], torch.tensor([8, 0, 3]), 1)

    @pytest.mark.parametrize("kept", [0, 1, 63, 100, 129])
    @pytest.mark.parametrize("inner", [1, 63, 129, 1030])
    def test_odd_sizes(self, kept: int, inner: int) -> None:
        rows = torch.randperm(129, generator=torch.Generator().manual_seed(kept))[:kept]
        self.both_ways([draw((2, 129, inner), torch.float16)], rows, 1)

    @pytest.mark.parametrize(
        ("shape", "dim"), [((9,), 0), ((9, 4), 0), ((2, 9), 1), ((2, 3, 9, 4), 2), ((2, 9, 3, 4), 1), ((2, 3, 4, 9), 3)]
    )
    def test_any_axis(self, shape: tuple[int, ...], dim: int) -> None:
        self.both_ways([draw(shape)], torch.tensor([1, 2, 8], dtype=torch.int32), dim)

    def test_any_strides(self) -> None:
        rows = torch.tensor([5, 2])
        self.both_ways([in_nan(draw((2, 6, 3, 16)), gap=3)], rows, 1)
        self.both_ways([draw((2, 5, 6)).transpose(1, 2)], rows, 1)
        self.both_ways([draw((2, 12, 5))[:, ::2]], rows, 1)
        self.both_ways([draw((1, 6, 5)).expand(3, 6, 5)], rows, 1)
        self.both_ways([draw((2, 3, 6, 4, 5)).permute(4, 1, 2, 0, 3)], rows, 2)

    def test_several_tensors_share_launches(self) -> None:
        x = [draw((2, 9, 5), torch.float16), draw((1, 9, 3), torch.int64), draw((2, 9, 40), torch.bfloat16)]
        x += [draw((2, 9, 4, 2), torch.float16), draw((1, 9, 2), torch.float64)]
        self.both_ways(x, torch.tensor([8, 1, 4]), 1)

    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        outer=st.integers(0, 3),
        size=st.integers(1, 140),
        inner=st.lists(st.integers(0, 40), min_size=1, max_size=5),
        data=st.data(),
    )
    def test_any_shape(self, outer: int, size: int, inner: list[int], data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size))
        x = [in_nan(draw((outer, size, n), torch.float16), gap=1) for n in inner]
        self.both_ways(x, torch.tensor(rows, dtype=torch.int64), 1)

    def test_gradients_through_the_public_functions(self) -> None:
        rows = torch.tensor([4, 0])
        x = draw((2, 6, 3)).requires_grad_()
        weight = draw((2, 6, 3)) + 1
        with self.running():
            packed = pack_rows(x, rows, backend=self.backend)
            (grad,) = torch.autograd.grad((unpack_rows(packed, rows, 6, backend=self.backend) * weight).sum(), x)
        expected = torch.zeros_like(grad)
        expected[:, rows] = weight[:, rows]
        assert torch.equal(grad, expected)

    def test_rows_outside_touch_nothing(self) -> None:
        x = in_nan(draw((1, 4, 16)), gap=16)
        with self.running(), Canaries():
            (packed,) = self.pack([x], torch.tensor([-1, 2, 4]), 1)
            (back,) = self.unpack([torch.ones(1, 3, 16)], torch.tensor([-1, 2, 4]), 4, 1)
        assert torch.equal(packed[:, 1], x[:, 2])
        assert (packed[:, [0, 2]] == 0).all()
        assert torch.equal(back.sum(-1), torch.tensor([[0.0, 0.0, 16.0, 0.0]]))

    def test_rows_far_apart_need_int64_offsets(self) -> None:
        flat = torch.empty(2**31 + 64, dtype=torch.float16)  # virtual memory, hardly any of it touched
        far = flat.as_strided((1, 3, 32), (0, 2**30, 1))
        far.copy_(draw((1, 3, 32)))
        with self.running(), Canaries():
            (packed,) = self.pack([far], torch.tensor([2, 0]), 1)
        assert torch.equal(packed, far[:, [2, 0]])
