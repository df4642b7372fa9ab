"""pack_rows and unpack_rows with `backend="cuda"`, from the public door to the emulated kernels: bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.functional import pack_rows, unpack_rows
from sparse_ref_attn.ops.pack_rows.impl.cuda import nested

from .emulated import emulated, shipped


@pytest.fixture(autouse=True)
def emulator() -> Iterator[None]:
    with emulated(shipped()):
        yield


def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randint(1, 1 << 20, size, generator=torch.Generator().manual_seed(0))
    return (x % 2 == 0) if dtype == torch.bool else x.to(dtype)


def kept(size: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(1))[:count].to(dtype)


def check(x: Tensor | list[Tensor], rows: Tensor, dim: int = 1) -> None:
    packed = pack_rows(x, rows, dim, backend="cuda")
    for one, expected in zip(*map(_list, (packed, pack_rows(x, rows, dim, backend="reference"))), strict=True):
        assert torch.equal(one, expected)
    size = _list(x)[0].shape[dim]
    full = unpack_rows(packed, rows, size, dim, backend="cuda")
    expected = unpack_rows(packed, rows, size, dim, backend="reference")
    for one, other in zip(_list(full), _list(expected), strict=True):
        assert torch.equal(one, other)


def _list(x: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def test_several_tensors_of_several_kinds() -> None:
    rows = kept(40, 17)
    check([draw(2, 40, 64, dtype=torch.float16), draw(1, 40, 3), draw(3, 40, dtype=torch.int64), draw(2, 40, 0)], rows)
    check([draw(2, 40, 8) for _ in range(20)], rows)


def test_any_strides() -> None:
    rows = kept(12, 5)
    x = draw(3, 12, 4, 6)
    for layout in (x.transpose(2, 3), x.transpose(0, 2), x[:, :, 1:3, ::2], x[..., :1], x.expand(3, 12, 4, 6)):
        check(layout, rows)
    check(x[:1].expand(5, 12, 4, 6), rows)


def test_more_axes_than_a_kernel_takes() -> None:
    x = draw(2, 3, 2, 12, 3, 2, 4).permute(6, 0, 2, 3, 5, 1, 4)
    rows = kept(12, 5)
    assert len(nested(x, pack_rows(x, rows, 3, backend="reference"), 3)[1]) > 4
    check(x, rows, 3)
    full = unpack_rows(x, kept(20, 12), 20, 3, backend="cuda")
    assert torch.equal(full, unpack_rows(x, kept(20, 12), 20, 3, backend="reference"))


def test_lazy_conjugates_are_resolved() -> None:
    x = torch.complex(torch.randn(2, 9, 3), torch.randn(2, 9, 3)).conj()
    check(x, kept(9, 4))
