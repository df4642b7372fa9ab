"""A tensor and its strides as one argument of a launch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sparse_ref_attn.ops.shared.operand import Operand, rows_of, wide


@triton.jit
def _row_strides(X, OUT):
    product = wide(X.row) * 4
    tl.store(OUT, product)


@pytest.mark.parametrize("row", [0, 1, 48, 2**31 - 16, 2**31 + 16])
def test_a_row_stride_is_int64_whatever_its_size(row: int) -> None:
    """1 is a constant to Triton, and numbers below 2^31 are int32."""
    out = torch.zeros(1, dtype=torch.int64)
    _row_strides[(1,)](Operand(None, row), out)
    assert out.item() == 4 * row


@triton.jit
def _take(X, OUT, C: tl.constexpr):
    rows = tl.arange(0, 4) * 2
    head = tl.cast(tl.program_id(0), tl.int64)
    tl.store(rows_of(OUT, head, tl.arange(0, 4), C), tl.load(rows_of(X, head, rows, C)))


def test_rows_of_a_head_lie_where_the_strides_say() -> None:
    x = torch.randn(3, 8, 32)[:, :, :16].transpose(0, 1)  # (rows, heads, C), heads outside
    out = torch.zeros(4, 3, 16)
    _take[(3,)](*(Operand(t, t.stride(0), t.stride(1)) for t in (x, out)), C=16)
    assert torch.equal(out, x[::2])
