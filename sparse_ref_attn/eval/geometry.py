"""A model's transformer without its weights, by name or from a pipeline's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..adapters.geometries import MODELS, named_model
from ..errors import ConfigError, VersionError

__all__ = ["meta_transformer"]


def meta_transformer(model: str) -> Any:
    """The transformer of `model` on the meta device.

    Parameters
    ----------
    model : str
        A published model's name (`adapters.geometries.MODELS`), or a directory that ``save_pretrained`` wrote: the
        pipeline's, or its transformer's. Its weights are not read.

    Raises
    ------
    ConfigError
        If it is neither.
    VersionError
        If diffusers is not installed.

    Examples
    --------
    >>> meta_transformer("kontext").config.num_layers
    19
    """
    if model in MODELS:
        return named_model(model)
    found = [path for path in (Path(model, "transformer", "config.json"), Path(model, "config.json")) if path.is_file()]
    if not found:
        raise ConfigError(
            f"the model must be one of {', '.join(MODELS)}, or a directory with a transformer's config.json, "
            f"got {model}"
        )
    try:
        import diffusers
    except ImportError as error:
        raise VersionError("a model's geometry needs diffusers: pip install 'sparse-ref-attn[diffusers]'") from error
    try:
        config = json.loads(found[0].read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{found[0]} must be JSON, got {error}") from error
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        raise ConfigError(f"{found[0]} must name a class of diffusers, got {config.get('_class_name')!r}")
    with torch.device("meta"):
        return cls.from_config(config)
