"""A model's transformer without its weights, by name or from a pipeline's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..adapters.pipeline_facts import PipelineFacts
from ..errors import ConfigError, VersionError
from ..models import edit_facts_named, named_model, published_size
from ..vocabulary import MODELS, chosen, near

__all__ = ["assumed_size", "meta_transformer", "pipeline_of"]


def meta_transformer(model: str) -> Any:
    """The transformer of `model` on the meta device.

    Parameters
    ----------
    model : str
        A published model's name (`models.MODELS`), or a directory that ``save_pretrained`` wrote: the
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
    if (name := _named(model)) is not None:
        return named_model(name)
    found = [path for path in (Path(model, "transformer", "config.json"), Path(model, "config.json")) if path.is_file()]
    if not found:
        raise ConfigError(
            f"the model must be one of {', '.join(MODELS)}, or a directory with a transformer's config.json, "
            f"got {model}{near(model, MODELS)}"
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


def pipeline_of(model: str) -> tuple[PipelineFacts | None, bool]:
    """The published pipeline of `model`, as in `meta_transformer`, and whether it is distilled to few steps.

    None for a transformer's directory, and for a pipeline that is not known.

    Examples
    --------
    >>> facts, distilled = pipeline_of("klein-9b")
    >>> facts.name, distilled
    ('Flux2KleinPipeline', True)
    """
    if (name := _named(model)) is not None:
        size = published_size(name)
        return size.pipeline, size.distilled
    path = Path(model, "model_index.json")
    if not path.is_file():
        return None, False
    try:
        index = json.loads(path.read_text())
        cls, distilled = index.get("_class_name"), index.get("is_distilled")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConfigError(f"{path} must be a JSON object, got {error}") from error
    facts = edit_facts_named(cls)
    if facts is None:
        return None, False
    return facts, bool(facts.distilled if distilled is None else distilled)


def assumed_size(model: str) -> str | None:
    """What to say of a model by name whose published size is not known.

    Examples
    --------
    >>> assumed_size("kontext") is None
    True
    """
    name = _named(model)
    if name is None or not published_size(name).assumed:
        return None
    return f"The published size of {name} is not known: these are the defaults of its class in diffusers."


def _named(model: str) -> str | None:
    try:
        return chosen("model", model, MODELS)
    except ConfigError:
        return None
