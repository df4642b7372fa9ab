"""The published models by name: their size, and what of them can be changed."""

from __future__ import annotations

import pytest
import torch

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.models import named_model
from sparse_ref_attn.models.named_models import published_size
from sparse_ref_attn.vocabulary import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_named_models_have_their_published_size(name):
    parameters = list(named_model(name).parameters())
    assert sum(p.numel() for p in parameters) / 1e9 == pytest.approx(published_size(name).billions, abs=0.1)
    assert {(p.device.type, p.dtype, p.requires_grad) for p in parameters} == {("meta", torch.bfloat16, False)}


def test_named_models_are_found_by_name_and_cut_by_field():
    assert named_model("qwen-image-edit-2511").config.zero_cond_t
    assert len(named_model("klein-9b", num_layers=2).transformer_blocks) == 2
    with pytest.raises(ConfigError, match="kontext, flux2-dev"):
        named_model("flux9")
    with pytest.raises(ConfigError, match="width"):
        named_model("kontext", width=3)


def test_the_docstring_names_them_all() -> None:
    assert [name for name in MODELS if f'"{name}"' not in (named_model.__doc__ or "")] == []
