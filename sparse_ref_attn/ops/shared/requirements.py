"""What kernels need of tensors, whatever the op: a device, a layout in memory, a package."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .cuda_launch import CHANNELS, DTYPES, against

__all__ = ["UNALIGNED", "csrc_reasons", "has_16_byte_rows", "has_triton", "is_aligned", "triton_reasons"]

UNALIGNED = "needs a pointer at a multiple of 16 bytes and strides of multiples of 16 elements"


def has_16_byte_rows(x: Tensor) -> bool:
    """Whether every row along the last dim starts at a multiple of 16 bytes."""
    return not x.numel() or (
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    )


def is_aligned(x: Tensor) -> bool:
    """Whether Triton will know that every row along the last dim starts at a multiple of 16 bytes.

    It asks that of the pointer, and 16 elements of every stride; otherwise it turns its 16-byte asynchronous copies
    into 2-byte loads, without a word.
    """
    if not x.numel():
        return True
    strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return x.data_ptr() % 16 == 0 and all(n == 1 or s % 16 == 0 for n, s in strides)


@cache
def has_triton() -> bool:
    """Whether the package is installed."""
    return find_spec("triton") is not None


def triton_reasons(*tensors: Tensor) -> list[str]:
    """Why Triton kernels cannot run on these tensors (last dim: channels); the op's own limits come on top."""
    if not has_triton():
        return ["needs triton"]
    from triton import knobs

    why = []
    interpreted = knobs.runtime.interpret
    if not interpreted and not all(x.is_cuda for x in tensors):
        why.append(f"needs a CUDA device, or TRITON_INTERPRET=1, got {tensors[0].device}")
    if any(x.stride(-1) != 1 for x in tensors if x.numel()):
        why.append("needs a contiguous last dim")
    elif not all(is_aligned(x) for x in tensors if x.numel()):
        why.append(UNALIGNED)
    return why


def csrc_reasons(device: torch.device, dtype: torch.dtype, channels: int, aligned: bool) -> list[str]:
    """Why the attention kernels of csrc cannot run; `aligned`, whether every operand has `has_16_byte_rows`."""
    why = against(device)
    if dtype not in DTYPES:
        why.append(f"needs float16 or bfloat16, got {dtype}")
    if channels not in CHANNELS:
        why.append(f"needs a head dim of 64 or 128, got {channels}")
    if not aligned:
        why.append("needs every row to start at a multiple of 16 bytes (strides and storage offset)")
    return why
