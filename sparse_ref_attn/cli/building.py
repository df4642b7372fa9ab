"""``sra build-kernels``: what it does with its arguments."""

from __future__ import annotations

import argparse
import time

import torch

from ..kernels import toolchain
from ..kernels.build import build_kernels

__all__ = ["build"]


def build(options: argparse.Namespace) -> None:
    """The CUDA C++ kernels, compiled into the user's cache."""
    archs = toolchain.requested_archs() if options.archs is None else toolchain.parse_archs(options.archs)
    if not archs and torch.cuda.is_available() and torch.version.hip is None:
        cards = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = tuple(dict.fromkeys(map(toolchain.arch_for, cards)))
    began = time.perf_counter()
    path = build_kernels(archs or None, verbose=True)
    print(f"Built {path} in {time.perf_counter() - began:.0f} s.")
