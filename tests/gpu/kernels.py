"""The backends whose kernels are this library's own, and what a test of them needs."""

from __future__ import annotations

import pytest
import torch

from sparse_ref_attn.ops.shared import cuda_launch

__all__ = ["OWN", "require"]

OWN = ("triton", "cuda")


def require(backend: str, channels: int = 64) -> None:
    """Skip, aloud, where the kernels of csrc are not built for this card or do not have the head dim."""
    if backend != "cuda":
        return
    if channels not in cuda_launch.CHANNELS:
        pytest.skip(f"cuda has no kernel for a head dim of {channels}")
    why = cuda_launch.against(torch.device("cuda", torch.cuda.current_device()))
    if why:
        pytest.skip(f"cuda {'; '.join(why)}")
