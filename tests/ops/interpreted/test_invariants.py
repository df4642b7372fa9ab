"""The promises of `gather_attention`, kept by the interpreted kernels."""

from __future__ import annotations

import pytest
import torch

from ..invariants import INVARIANTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("invariant", INVARIANTS)
def test_invariant(invariant, dtype: torch.dtype) -> None:
    invariant("triton", dtype)
