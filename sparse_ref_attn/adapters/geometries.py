"""The supported models at their real size, without their weights: for estimates and benchmarks."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..hooks.diffusers import check_diffusers
from ..vocabulary import MODELS, chosen
from .flux2_cache import keep_references

__all__ = ["MODELS", "named_model"]

_KLEIN = {"guidance_embeds": False}
_KLEIN_9B = _KLEIN | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
_KLEIN_4B = _KLEIN | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}

# Of `MODELS` -> class in diffusers, and where the published model differs from the class's defaults.
_GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "kontext": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux2-dev": ("Flux2Transformer2DModel", {}),
    "klein-9b": ("Flux2Transformer2DModel", _KLEIN_9B),
    "klein-9b-kv": ("Flux2Transformer2DModel", _KLEIN_9B),
    "klein-4b": ("Flux2Transformer2DModel", _KLEIN_4B),
    "qwen-image-edit": ("QwenImageTransformer2DModel", {}),
    "qwen-image-edit-2511": ("QwenImageTransformer2DModel", {"zero_cond_t": True}),
}


def named_model(
    name: str, *, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> nn.Module:
    """The transformer of a published model, by name, with no weights (meta) or random ones.

    Parameters
    ----------
    name : {"kontext", "flux2-dev", "klein-9b", "klein-9b-kv", "klein-4b", "qwen-image-edit", "qwen-image-edit-2511"}
        "klein-9b-kv" has the processors that keep the references' keys and values, as its pipeline puts them on.
    device : torch.device or str
        Default "meta": no memory is used. On a real device the weights are random.
    dtype : torch.dtype
        Of the parameters. Default bfloat16, as published.
    **changes
        Fields of the class's config to change, such as ``num_layers`` to cut the depth.

    Returns
    -------
    torch.nn.Module
        In eval mode, without gradients.

    Raises
    ------
    ConfigError
        If the name is unknown, or a change is not a field of the class's config.
    VersionError
        If diffusers is missing or outside the supported range.

    Examples
    --------
    >>> model = named_model("kontext")
    >>> round(sum(p.numel() for p in model.parameters()) / 1e9, 1)
    11.9
    """
    name = chosen("a model's name", name, MODELS)
    check_diffusers()
    class_name, config = _GEOMETRIES[name]
    cls = getattr(importlib.import_module("diffusers"), class_name)
    with torch.device(device):
        try:
            model = cls(**(config | changes))
        except TypeError as error:
            raise ConfigError(f"changes must be fields of {class_name}'s config, got {sorted(changes)}") from error
    if name.endswith("-kv"):
        keep_references(model)
    return nn.Module.to(model, dtype=dtype).eval().requires_grad_(False)  # diffusers' own `to` warns of the cast
