"""A pipeline from a directory or a hub id, on a device that is there."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..errors import ConfigError, VersionError
from ..pictures import open_image
from ..vocabulary import OFFLOADS, chosen
from .calls import check_class

__all__ = ["DTYPES", "check_device", "load_pipeline", "open_image", "out_of_memory"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NO_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUDA error: out of memory")


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
    check_device(device)
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if dtype is None else dtype
    dtype, offload = chosen("dtype", dtype, DTYPES), chosen("offload", offload, OFFLOADS)
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
    except MemoryError:
        raise
    except Exception as error:  # whatever a broken file, an unknown class or a part that is missing makes of it
        if out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"the model must be a pipeline's directory or a hub id that diffusers can load, got {model}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    check_class(pipe)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe, device


def check_device(device: str) -> None:
    """Raise ConfigError for a device that torch does not know, or that is not there."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device must be one that torch knows, such as cpu or cuda:0, got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device} must be there, got no CUDA device on this machine")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        if out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), "").partition(". This could be")[0]
        raise ConfigError(f"device {device} must be one that this torch can compute on, got: {reason}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on a card or on the host."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )
