"""A pipeline from a directory or a hub id, and the arguments that its class wants."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import ConfigError, UnsupportedModelError, VersionError
from ..pictures import open_image

__all__ = ["DTYPES", "OFFLOADS", "call_arguments", "load_pipeline", "open_image"]

# Published pipelines that edit reference images; whether a list of images is several references of one picture.
SEVERAL_REFERENCES = {
    "FluxKontextPipeline": False,
    "Flux2Pipeline": True,
    "Flux2KleinPipeline": True,
    "Flux2KleinKVPipeline": True,
    "QwenImageEditPipeline": False,
    "QwenImageEditPlusPipeline": True,
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OFFLOADS = ("none", "model", "sequential")


def load_pipeline(
    model: str, *, device: str | None = None, dtype: str | None = None, offload: str = "none"
) -> tuple[Any, str]:
    """Load a reference-conditioned diffusers pipeline; its class is the one the model names.

    Parameters
    ----------
    model : str
        Directory written by ``save_pretrained``, or a hub id.
    device : str, optional
        Default "cuda" where there is one, else "cpu".
    dtype : {"bfloat16", "float16", "float32"}, optional
        Default bfloat16 on CUDA, float32 elsewhere.
    offload : {"none", "model", "sequential"}
        diffusers' own offloading to the CPU's memory; needs a CUDA device.

    Returns
    -------
    pipe : diffusers pipeline
    device : str
        Where it runs.

    Raises
    ------
    ConfigError
        If the model cannot be read, the device is not there, or a setting is unknown.
    UnsupportedModelError
        If the pipeline is none of those that edit reference images.
    VersionError
        If diffusers is not installed.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if dtype is None else dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if offload not in OFFLOADS:
        raise ConfigError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    if offload != "none" and not device.startswith("cuda"):
        raise ConfigError(f"offload {offload!r} needs a CUDA device, got {device}")
    try:
        import transformers  # noqa: F401 -- diffusers imports without it, and then has no pipelines
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise VersionError(
            "a pipeline needs diffusers and transformers: pip install 'sparse-ref-attn[diffusers]'"
        ) from error
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "model_index.json")):
        raise ConfigError(f"a pipeline's directory must hold model_index.json, got {model}")
    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=DTYPES[dtype])
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the model must be a pipeline's directory or a hub id, got {model}: {reason}") from error
    _check_class(pipe)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe, device


def call_arguments(
    pipe: Any,
    images: Sequence[Any],
    prompt: str,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The keyword arguments of ``pipe(...)``, without the generator.

    Parameters
    ----------
    pipe : diffusers pipeline
    images : sequence of PIL.Image.Image
        The references.
    prompt : str
    size : (int, int), optional
        Height and width of the output in pixels; default the pipeline's own choice.
    steps : int, optional
        Default the pipeline's own.
    more : mapping, optional
        Arguments of the pipeline's ``__call__``, over all others.

    Raises
    ------
    ConfigError
        If the pipeline takes one reference and gets several, or has no such argument.
    UnsupportedModelError
        If the pipeline is none of those that edit reference images.
    """
    name = _check_class(pipe)
    if len(images) > 1 and not SEVERAL_REFERENCES[name]:
        raise ConfigError(f"{name} takes one reference image, got {len(images)}")
    parameters = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(more or {}) - set(parameters))
    if unknown:
        raise ConfigError(f"{name} must have the arguments that are set, got {', '.join(unknown)}")
    arguments: dict[str, Any] = {"prompt": prompt, "image": list(images) if len(images) > 1 else images[0]}
    if size is not None:
        arguments |= {"height": size[0], "width": size[1]}
        if "max_area" in parameters:  # Kontext scales the output to this area, whatever height and width say
            arguments["max_area"] = size[0] * size[1]
    arguments["num_inference_steps"] = parameters["num_inference_steps"].default if steps is None else steps
    return arguments | dict(more or {})


def _check_class(pipe: Any) -> str:
    """The published class that the pipeline is, or derives from."""
    for cls in type(pipe).__mro__:
        if cls.__module__.startswith("diffusers.") and cls.__name__ in SEVERAL_REFERENCES:
            return cls.__name__
    raise UnsupportedModelError(
        f"the pipeline must be one of {', '.join(SEVERAL_REFERENCES)}, got {type(pipe).__name__}; others (inpainting, "
        "your own) are patched from Python: sparse_ref_attn.patch(pipe)"
    )


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device must be one that torch knows, such as cpu or cuda:0, got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device} must be there, got no CUDA device on this machine")
