"""Which packages with packed FlashAttention can be called here, and why another cannot."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature

import torch

__all__ = ["flash_packages"]


def flash_packages(device: torch.device, dtype: torch.dtype, backward: bool = False) -> dict[str, list[str]]:
    """What is against each package with packed FlashAttention, by the name of its module, the best one first."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if nvidia else (0, 0)
    ampere = [] if capability >= (8, 0) else ["needs an NVIDIA card of compute capability 8.0 or later"]
    hopper = [] if capability[0] == 9 else ["needs an NVIDIA card of compute capability 9.0"]
    forward_only = ["has no backward"] if backward else []
    if dtype != torch.bfloat16:
        forward_only.append(f"needs bfloat16, got {dtype}")
    inside = [] if torch.backends.cuda.is_flash_attention_available() else ["was built without FlashAttention"]
    return {
        "flash_attn_interface": hopper + _flash_module("flash_attn_interface"),
        "fa3_fwd_interface": hopper + forward_only + _flash_module("fa3_fwd_interface"),
        "flash_attn": ampere + _flash_module("flash_attn", at_least=(2, 7)),
        "torch": ampere + inside,
    }


@cache
def _flash_module(name: str, at_least: tuple[int, int] = (0, 0)) -> list[str]:
    if find_spec(name) is None:
        return ["is not installed"]
    try:
        module = import_module(name)
    except (ImportError, OSError) as error:  # built for another PyTorch or CUDA
        return [f"cannot be imported: {str(error).splitlines()[0]}"]
    attend = getattr(module, "flash_attn_varlen_func", None)
    if attend is None or "return_attn_probs" not in signature(attend).parameters:
        return ["must have a flash_attn_varlen_func that returns the lse (return_attn_probs)"]
    version = str(getattr(module, "__version__", ""))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < at_least and at_least > (0, 0):
        return [f"must be {at_least[0]}.{at_least[1]} or later, got {version or 'no version'}"]
    return []
