"""A per-sample FLUX.2 training step, packed, forward and backward through the interpreted kernels."""

from __future__ import annotations

import pytest
import torch

from .. import packed_flux2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", [packed_flux2.dense, packed_flux2.indexed])
def test_gradients_of_every_parameter(path, dtype: torch.dtype) -> None:
    packed_flux2.check(path, "triton", dtype)
