"""Packing rows and putting them back."""

from __future__ import annotations

import pytest
import torch

from sparse_ref_attn.errors import LayoutError
from sparse_ref_attn.functional import pack_rows, unpack_rows


def draw(size, kept, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randperm(size, generator=random)[:kept].sort().values
    return torch.randn(2, size, 3, generator=random).to(dtype), rows


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (63, 1), (100, 63), (129, 129), (64, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_taken_and_put_back(size, kept, dtype):
    x, rows = draw(size, kept, dtype)
    packed = pack_rows(x, rows)
    assert packed.shape == (2, kept, 3)
    for t, row in enumerate(rows.tolist()):
        assert torch.equal(packed[:, t], x[:, row])
    back = unpack_rows(packed, rows, size)
    assert torch.equal(back[:, rows], x[:, rows])
    dropped = torch.ones(size, dtype=torch.bool)
    dropped[rows] = False
    assert (back[:, dropped] == 0).all()
    assert back.dtype == dtype
    assert torch.equal(pack_rows(back, rows), packed)


def test_every_row_kept_is_the_identity_and_a_copy():
    x, rows = draw(50, 50)
    packed = pack_rows(x, rows)
    assert torch.equal(packed, x)
    assert torch.equal(unpack_rows(packed, rows, 50), x)
    packed.zero_()
    assert (x != 0).any()


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_any_axis(dim):
    x = torch.arange(4 * 5 * 6.0).reshape(4, 5, 6)
    rows = torch.tensor([0, 3])
    packed = pack_rows(x, rows, dim)
    assert packed.shape[dim] == 2
    assert torch.equal(packed.select(dim, 1), x.select(dim, 3))
    back = unpack_rows(packed, rows, x.shape[dim], dim)
    assert back.shape == x.shape
    assert torch.equal(back.select(dim, 3), x.select(dim, 3))
    assert (back.select(dim, 1) == 0).all()


def test_any_order_of_rows_and_strides():
    x = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    rows = torch.tensor([7, 2, 5])
    packed = pack_rows(x, rows)
    assert torch.equal(packed[:, 0], x[:, 7])
    assert torch.equal(unpack_rows(packed, rows, 10)[:, rows], packed)


def test_gradients():
    x, rows = draw(9, 4)
    assert torch.autograd.gradcheck(lambda x: pack_rows(x, rows), x.requires_grad_())
    y = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: unpack_rows(y, rows, 9), y)


def test_a_dropped_row_has_a_gradient_of_exactly_zero():
    x, rows = draw(20, 6)
    x.requires_grad_()
    pack_rows(x, rows).sin().sum().backward()
    dropped = torch.ones(20, dtype=torch.bool)
    dropped[rows] = False
    assert (x.grad[:, dropped] == 0).all()
    assert (x.grad[:, rows] != 0).all()


def test_each_is_the_adjoint_of_the_other():
    x, rows = draw(30, 11)
    y = torch.randn(2, 11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((pack_rows(x, rows) * y).sum(), (x * unpack_rows(y, rows, 30)).sum())


def test_both_compile_into_one_graph():
    x, rows = draw(12, 5, torch.float32)

    def there_and_back(x, rows):
        return unpack_rows(pack_rows(x, rows) * 2, rows, x.shape[1])

    compiled = torch.compile(there_and_back, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, rows), there_and_back(x, rows))


def test_bad_input_is_said_in_words():
    x, rows = draw(6, 3)
    with pytest.raises(LayoutError, match=r"vector of row numbers, int32 or int64, got shape \(1, 3\)"):
        pack_rows(x, rows[None])
    with pytest.raises(LayoutError, match="vector of row numbers"):
        unpack_rows(x, rows[None], 6)
    with pytest.raises(LayoutError, match="must number the 6 rows of y along dim 1, got 3"):
        unpack_rows(x, rows, 12)
    with pytest.raises(LayoutError, match=r"int32 or int64, got shape \(3,\), torch.float32"):
        pack_rows(x, rows.float())
    with pytest.raises(LayoutError, match="rows must lie on the tensors' device, meta, got cpu"):
        pack_rows(x.to("meta"), rows)
    for dim in (3, 7, -4):
        with pytest.raises(LayoutError, match=f"dim must be one of the tensors' 3 axes, got {dim}"):
            pack_rows(x, rows, dim)


@pytest.mark.parametrize("wrong", [-1, 6, 2**31 - 1])
def test_a_row_outside_is_named(wrong):
    x = torch.randn(2, 6, 3)
    rows = torch.tensor([2, wrong])
    with pytest.raises(
        LayoutError, match=rf"rows must lie in \[0, 6\), got values from {min(2, wrong)} to {max(2, wrong)}"
    ):
        pack_rows(x, rows)
    with pytest.raises(LayoutError, match=r"rows must lie in \[0, 6\)"):
        unpack_rows(x[:, :2], rows, 6)


def test_checking_names_rows_that_stand_twice():
    x, rows = torch.randn(1, 6, 3), torch.tensor([4, 1, 4])
    assert torch.equal(pack_rows(x, rows), x[:, rows])
    with pytest.raises(LayoutError, match="rows must be distinct, got 3 of which 2 differ"):
        pack_rows(x, rows, check=True)
