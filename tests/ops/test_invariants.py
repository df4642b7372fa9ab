"""The promises of `gather_attention`, kept by the definition and by the SDPA backend."""

from __future__ import annotations

import pytest
import torch

from .invariants import INVARIANTS


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.bfloat16)]
)
@pytest.mark.parametrize("invariant", INVARIANTS)
def test_invariant(invariant, backend: str, dtype: torch.dtype) -> None:
    invariant(backend, dtype)
