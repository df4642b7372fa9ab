"""A transformer's weights in 8 or 4 bits, by the packages that diffusers knows."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..errors import ConfigError, VersionError
from ..vocabulary import QUANTIZATIONS, chosen

__all__ = ["check_quantization", "quantization"]

_PACKAGES = dict(zip(QUANTIZATIONS, ("torchao", "torchao", "bitsandbytes"), strict=True))


def check_quantization(kind: str, device: str) -> str:
    """The kind by its name in `QUANTIZATIONS`, where its package is installed and can quantize for a device.

    Raises
    ------
    ConfigError
        For an unknown kind, and for "nf4" without a CUDA device.
    VersionError
        If the package is not installed.
    """
    kind = chosen("quantize", kind, QUANTIZATIONS)
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        raise VersionError(f"quantize {kind} needs {_PACKAGES[kind]}: pip install {_PACKAGES[kind]}")
    if _PACKAGES[kind] == "bitsandbytes" and not device.startswith("cuda"):
        raise ConfigError(f"quantize {kind} needs a CUDA device, got {device}; int8 needs none")
    return kind


def quantization(kind: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """What ``DiffusionPipeline.from_pretrained`` takes as ``quantization_config``; the transformer alone is quantized.

    Parameters
    ----------
    kind : {"int8", "float8", "nf4"}
        Weights of 8 bits (torchao) or 4 (bitsandbytes).
    dtype : torch.dtype
        What the linear layers compute in.
    device : str
        Where the model is to run.

    Raises
    ------
    ConfigError, VersionError
        As `check_quantization`, and for a package that is too old.

    Examples
    --------
    >>> list(quantization("int8", torch.bfloat16).quant_mapping)
    ['transformer']
    """
    kind = check_quantization(kind, device)
    import diffusers

    try:
        if kind == "nf4":
            weights: Any = diffusers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        else:
            import torchao.quantization as ao

            weights = diffusers.TorchAoConfig(
                ao.Int8WeightOnlyConfig(version=2) if kind == "int8" else ao.Float8WeightOnlyConfig()
            )
        return diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": weights})
    except (ImportError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise VersionError(
            f"quantize {kind} needs a {_PACKAGES[kind]} that diffusers can use: pip install -U {_PACKAGES[kind]}, "
            f"got: {reason}"
        ) from error
