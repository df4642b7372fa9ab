"""Models that are refused by name, each with its reason."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers.models.transformers import transformer_omnigen

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.classes import load_class
from sparse_ref_attn.errors import UnsupportedModelError
from sparse_ref_attn.models import adapter_for, supported
from sparse_ref_attn.models.refused import REFUSED
from sparse_ref_attn.models.registry import _REGISTRY


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_reason(name: str) -> None:
    cls = load_class(name)
    assert name not in supported()
    for kind in (cls, type("Tuned", (cls,), {})):
        with pytest.raises(UnsupportedModelError) as error:
            adapter_for(object.__new__(kind))
        assert str(error.value).endswith(REFUSED[name])
        assert kind.__name__ in str(error.value)


TAKEN = {
    "OmniGenTransformer2DModel": ("input_ids", "input_img_latents", "input_image_sizes"),
    "WanAnimate2Transformer3DModel": ("condition_latents", "kv_cache", "kv_cache_mode"),
}
"""What of a model's call its reason speaks of."""


@pytest.mark.parametrize("name", REFUSED)
def test_its_call_is_as_the_reason_says(name: str) -> None:
    """A diffusers in which it is another wants another reason, or an adapter."""
    cls = load_class(name)
    parameters = inspect.signature(cls.forward).parameters
    assert set(TAKEN[cls.__name__]) <= set(parameters)
    if cls.__name__ == "OmniGenTransformer2DModel":
        assert not {"img_ids", "img_shapes", "shape_list"} & set(parameters)


def test_omnigen_turns_all_rows_by_the_positions_of_the_first_item() -> None:
    """With a table for each item, its rows could leave at places of their own."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    rope = transformer_omnigen.OmniGenSuScaledRotaryEmbedding(8, rope_scaling=factors)
    cos, sin = rope(torch.zeros(2, 3, 8), torch.tensor([[0, 1, 2], [0, 0, 1]]))
    assert cos.shape == sin.shape == (3, 8)
    assert torch.equal(sin[:, 0], torch.tensor([0.0, 1.0, 2.0]).sin() * (sin[1, 0] / torch.tensor(1.0).sin()))


def test_an_adapter_of_somebodys_own_serves_it() -> None:
    name = next(name for name in REFUSED if name.endswith("OmniGenTransformer2DModel"))
    own = sra.PlainAdapter("hidden_states", lambda kwargs: None)
    try:
        sra.register_adapter(name, own)
        assert adapter_for(object.__new__(load_class(name))) is own
    finally:
        _REGISTRY.pop(name)
