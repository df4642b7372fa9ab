"""Attention mass under masks that are not of keys alone, against the softmax in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_ref_attn.adapters.masks import not_of_keys
from sparse_ref_attn.ops.attention_mass.masked import attention_mass_masked
from tests.adapters.attention_masks import BETWEEN, KEYS, MASKS
from tests.pictures import generator


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mass_under_any_mask_is_the_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in many, with strides, and of queries that may attend to nothing."""
    q, k = (torch.randn(2, n, 3, 16, generator=generator(n)).to(dtype) for n in (33, 40))
    for name, make in MASKS.items():
        mask = make(2, 3, 4, 40)
        mask = mask[:, None, None] if mask.ndim == 2 and mask.shape[0] == 2 else mask
        mask = mask[(None,) * (4 - mask.ndim)]
        mask = mask[:, :, :33] if mask.shape[2] > 1 else mask
        if mask.dtype == torch.bool and mask.shape[2] > 1:
            mask = mask.clone()
            mask[:, :, 5] = False
        for stride in (1, 4):
            own = mask[:, :, ::stride] if mask.shape[2] > 1 else mask
            dense = torch.einsum("bnhc,bshc->bhns", q[:, ::stride].double(), k.double()) / 4
            dense = dense.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else dense + own.double()
            wanted = dense.softmax(-1).nan_to_num(0.0)[..., 7:29].mean(2)
            for pieces in (1 << 24, 300):
                monkeypatch.setattr("sparse_ref_attn.ops.attention_mass.masked._BUDGET", pieces)
                got = attention_mass_masked(q, k, (7, 29), mask, stride)
                assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                bound = 1e-14 if dtype == torch.float64 else 2e-6
                assert float((got - wanted).abs().max()) <= bound, name


def test_masks_of_keys_are_told_from_others() -> None:
    for name, make in KEYS.items():
        assert not_of_keys(make(2, 3, 4, 40), 2, 40) is None, name
    for name, make in BETWEEN.items():
        assert "must be of keys" in str(not_of_keys(make(2, 3, 4, 40), 2, 40)), name
