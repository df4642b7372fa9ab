"""A per-sample FLUX.2 training step, packed: the SDPA backend against the items one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import packed_flux2
from .packed_flux2 import Attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", [packed_flux2.dense, packed_flux2.indexed])
def test_gradients_of_every_parameter(path, dtype: torch.dtype) -> None:
    packed_flux2.check(path, "sdpa", dtype)


def test_items_that_see_each_other_are_noticed() -> None:
    def mixed(texts: Tensor, images: Tensor, backend: str) -> Attention:
        return lambda *qkv: scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    with pytest.raises(AssertionError, match="gradients: error"):
        packed_flux2.check(mixed, "", torch.bfloat16)
