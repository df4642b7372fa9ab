"""The supported models at their real size, without their weights: for estimates and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.classes import load_class
from ..adapters.published_size import PublishedSize
from ..errors import ConfigError
from ..hooks.diffusers import check_diffusers
from ..vocabulary import MODELS, chosen
from .registry import families

__all__ = ["MODELS", "named_model", "published_size"]


def named_model(
    name: str, *, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> nn.Module:
    """The transformer of a published model, by name, with no weights (meta) or random ones.

    Parameters
    ----------
    name : str
        One of `MODELS`: "kontext", "flux2-dev", "klein-9b", "klein-9b-kv", "klein-4b", "qwen-image-edit",
        "qwen-image-edit-2511", "qwen-image-layered", "longcat-image-edit", "flux3", "fibo-edit",
        "joyimage-edit", "joyimage-edit-plus", "glm-image", "qwen-image-2.1", "z-image-omni", "ltx-2".
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
    family = _family(name)
    size, cls = family.published[name], load_class(family.classes[0])
    with torch.device(device):
        try:
            model: nn.Module = cls(**{**size.config, **changes})
        except TypeError as error:
            raise ConfigError(f"changes must be fields of {cls.__name__}'s config, got {sorted(changes)}") from error
    if size.prepare is not None:
        size.prepare(model)
    return nn.Module.to(model, dtype=dtype).eval().requires_grad_(False)  # diffusers' own `to` warns of the cast


def published_size(name: str) -> PublishedSize:
    """What is known of a model of `MODELS`."""
    return _family(name).published[name]


def _family(name: str) -> Adapter:
    return next(family for family in families() if name in family.published)
