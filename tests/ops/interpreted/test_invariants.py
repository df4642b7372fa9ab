"""The promises of `gather_attention`, kept by the interpreted kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

from ..invariants import dropped_rows, empty_selection, keeping_all_rows, neighbours, order_of_kept_rows


@pytest.mark.parametrize(
    ("invariant", "dtype"),
    [
        *itertools.product([order_of_kept_rows, keeping_all_rows], [torch.float32, torch.bfloat16]),
        (neighbours, torch.bfloat16),
        (dropped_rows, torch.float32),
        (empty_selection, torch.bfloat16),
    ],
)
def test_invariant(invariant, dtype: torch.dtype) -> None:
    invariant("triton", dtype)
