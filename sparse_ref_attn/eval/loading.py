"""A pipeline from a directory or a hub id, on a device that is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError, VersionError
from ..pictures import open_image
from ..vocabulary import OFFLOADS, chosen
from .checked_arguments import check_class
from .loras import Lora, add_loras, check_loras
from .quantization import quantization

__all__ = [
    "DTYPES", "check_device", "check_place", "import_diffusers", "load_pipeline", "open_image", "out_of_memory",
]  # fmt: skip

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NO_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUDA error: out of memory")


def load_pipeline(
    model: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    offload: str = "none",
    quantize: str | None = None,
    loras: Sequence[Lora] = (),
) -> tuple[Any, str]:
    """Load a reference-conditioned diffusers pipeline; its class is the one the model names.

    Parameters
    ----------
    model : str
        Directory written by ``save_pretrained``, or a hub id.
    device : str, optional
        Default "cuda" where there is one, else "cpu".
    dtype : {"bfloat16", "float16", "float32"}, optional
        Default bfloat16 on CUDA and with `quantize`, float32 elsewhere.
    offload : {"none", "model", "sequential"}
        diffusers' own offloading to the CPU's memory; needs a CUDA device.
    quantize : {"int8", "float8", "nf4"}, optional
        The transformer's weights in fewer bits: `quantization`.
    loras : sequence of Lora
        Added before the model is moved.

    Returns
    -------
    pipe : diffusers pipeline
    device : str
        Where it runs.

    Raises
    ------
    ConfigError
        If the model or a LoRA cannot be read, the device is not there, or a setting is unknown.
    UnsupportedModelError
        If the pipeline is none of those that edit reference images.
    VersionError
        If diffusers, or what `quantize` or `loras` need, is not installed.
    """
    device = check_place(device, offload)
    check_loras(loras)
    half = device.startswith("cuda") or quantize is not None
    dtype = ("bfloat16" if half else "float32") if dtype is None else dtype
    dtype, offload = chosen("dtype", dtype, DTYPES), chosen("offload", offload, OFFLOADS)
    diffusers = import_diffusers()
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "model_index.json")):
        raise ConfigError(f"a pipeline's directory must hold model_index.json, got {model}")
    more = {} if quantize is None else {"quantization_config": quantization(quantize, DTYPES[dtype], device)}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=DTYPES[dtype], **more)
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
    add_loras(pipe, loras)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe, device


def import_diffusers() -> Any:
    """The module.

    Raises
    ------
    VersionError
        If it, or transformers, is not installed.
    """
    try:
        import diffusers
        import transformers  # noqa: F401 -- diffusers imports without it, and then has no pipelines
    except ImportError as error:
        raise VersionError(
            "a pipeline needs diffusers and transformers: pip install 'sparse-ref-attn[diffusers]'"
        ) from error
    return diffusers


def check_place(device: str | None, offload: str = "none") -> str:
    """The device that is meant, None being the default of `load_pipeline`.

    Raises
    ------
    ConfigError
        As `check_device`, and for offloading without a CUDA device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    if chosen("offload", offload, OFFLOADS) != "none" and not device.startswith("cuda"):
        raise ConfigError(f"offload {offload!r} needs a CUDA device, got {device}")
    return device


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
