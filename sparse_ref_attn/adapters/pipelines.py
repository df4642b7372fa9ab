"""The published pipelines that edit reference images: how many references one takes, and its number of steps."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

__all__ = ["OF_MODEL", "SEVERAL_REFERENCES", "published", "steps_of"]

SEVERAL_REFERENCES = {
    "FluxKontextPipeline": False,
    "Flux2Pipeline": True,
    "Flux2KleinPipeline": True,
    "Flux2KleinKVPipeline": True,
    "QwenImageEditPipeline": False,
    "QwenImageEditPlusPipeline": True,
}
"""By the class's name, whether a list of images is several references of one picture."""

OF_MODEL = {
    "kontext": ("FluxKontextPipeline", False),
    "flux2-dev": ("Flux2Pipeline", False),
    "klein-9b": ("Flux2KleinPipeline", True),
    "klein-9b-kv": ("Flux2KleinKVPipeline", True),
    "klein-4b": ("Flux2KleinPipeline", True),
    "qwen-image-edit": ("QwenImageEditPipeline", False),
    "qwen-image-edit-2511": ("QwenImageEditPlusPipeline", False),
}
"""The pipeline of each model that `named_model` knows, and whether the model is distilled to few steps."""

_DISTILLED_STEPS = 4


def published(pipe: Any) -> str | None:
    """The published class that a pipeline is, or derives from."""
    for cls in type(pipe).__mro__:
        if cls.__module__.startswith("diffusers.") and cls.__name__ in SEVERAL_REFERENCES:
            return cls.__name__
    return None


def steps_of(name: str, distilled: bool | None = None) -> int:
    """Steps of a published pipeline's call where nobody says how many: its class's default, 4 of a distilled model.

    Parameters
    ----------
    name : str
        Of `SEVERAL_REFERENCES`.
    distilled : bool, optional
        The pipeline's ``is_distilled``.

    Examples
    --------
    >>> steps_of("FluxKontextPipeline"), steps_of("Flux2KleinPipeline", distilled=True)
    (28, 4)
    """
    if distilled:
        return _DISTILLED_STEPS
    cls = getattr(importlib.import_module("diffusers"), name)
    return int(inspect.signature(cls.__call__).parameters["num_inference_steps"].default)
