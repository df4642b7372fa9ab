"""A transformer that looks like one of a family and is none: refused in words before anything is patched."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparse_ref_attn as sra
from sparse_ref_attn.errors import UnsupportedModelError
from sparse_ref_attn.models import registry
from sparse_ref_attn.models.flux import FluxAdapter
from sparse_ref_attn.models.flux2 import Flux2Adapter
from sparse_ref_attn.models.qwen import QwenImageAdapter
from tests.latents import CASES

GRID = sra.SparseRef("grid", 0.5)
ADAPTERS = {"kontext": FluxAdapter(), "klein": Flux2Adapter(), "qwen_edit": QwenImageAdapter()}


def untouched(model: nn.Module) -> None:
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("given", ADAPTERS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_each_family_takes_its_own_alone(name: str, given: str) -> None:
    model = CASES[name].build().transformer
    if name == given:
        with sra.patched(model, GRID, adapter=ADAPTERS[given]):
            pass
        return
    for act in (
        lambda: sra.patch(model, GRID, adapter=ADAPTERS[given]),
        lambda: sra.patch_for_training(model, sra.RandomDrop(), adapter=ADAPTERS[given]),
    ):
        with pytest.raises(UnsupportedModelError, match=r"adapter serves .* and what derives from it, got diffusers\."):
            act()
    untouched(model)


def chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=64, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip


def control() -> nn.Module:
    return diffusers.FluxControlNetModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


@pytest.mark.parametrize("build", [chroma, control])
def test_other_classes_of_diffusers_with_the_same_blocks_are_not_flux(build: Any) -> None:
    model = build()
    with pytest.raises(UnsupportedModelError, match="must have an adapter, got diffusers"):
        sra.patch(model, GRID)
    with pytest.raises(UnsupportedModelError, match=r"the FLUX\.1 Kontext adapter serves FluxTransformer2DModel"):
        sra.patch(model, GRID, adapter=FluxAdapter())
    untouched(model)


class FluxTransformer2DModel(nn.Module):
    """The published class's name, and nothing else of it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, img_ids: Tensor, txt_ids: Tensor) -> Tensor:
        return hidden_states


class OtherArguments(FluxTransformer2DModel):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        return x


class NoPositions(nn.Module):
    """Qwen's arguments and blocks, without its position embedding."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.attn = nn.Linear(4, 4)
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, img_shapes: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    ("model", "adapter", "message"),
    [
        (FluxTransformer2DModel(), FluxAdapter(), r"must have pos_embed, attn in each of transformer_blocks, single_"),
        (FluxTransformer2DModel(), Flux2Adapter(), r"single_transformer_blocks \(a ModuleList\)"),
        (FluxTransformer2DModel(), QwenImageAdapter(), "must have the arguments img_shapes"),
        (
            OtherArguments(),
            FluxAdapter(),
            "must have the arguments hidden_states, encoder_",
        ),
        (NoPositions(), QwenImageAdapter(), "must have pos_embed"),
    ],
)
def test_a_class_of_ones_own_that_is_built_otherwise(model: nn.Module, adapter: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        sra.patch(model, GRID, adapter=adapter)
    with pytest.raises(UnsupportedModelError, match=message):
        sra.patch_for_training(model, sra.RandomDrop(), adapter=adapter)
    before = dict(registry._REGISTRY)
    try:
        sra.register_adapter(type(model), adapter)
        with pytest.raises(UnsupportedModelError, match=message):
            sra.patch(model, GRID)
    finally:
        registry._REGISTRY.clear()
        registry._REGISTRY.update(before)
    untouched(model)


def test_what_derives_from_the_class_or_is_a_faithful_copy_of_it_is_served() -> None:
    case = CASES["kontext"]
    pipe = case.build()
    with sra.patched(pipe, GRID):
        want = case.call(pipe)
    published = type(pipe.transformer)

    class Tuned(published):  # type: ignore[valid-type,misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    fork = type("Fork", (nn.Module,), {n: v for n, v in vars(published).items() if n in ("forward",)})
    pipe.transformer.__class__ = Tuned
    with sra.patched(pipe, GRID):
        assert np.array_equal(case.call(pipe), want)
    copied = fork()
    copied.__dict__.update(pipe.transformer.__dict__)
    with sra.patched(copied, GRID, adapter=FluxAdapter()) as handle:
        assert "Kontext" in repr(handle)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="must have an adapter"):
        sra.patch(copied, GRID)
