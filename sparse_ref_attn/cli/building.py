"""``sra build-kernels``: what it does with its arguments."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..errors import BuildError
from ..kernels import toolchain
from ..kernels.build import build_kernels
from ..kernels.cpu_build import build_cpu_kernels

__all__ = ["build"]


def build(options: argparse.Namespace) -> None:
    """The kernels of csrc, compiled into the user's cache: those of the CPU and of CUDA, as far as there are compilers.

    Raises
    ------
    BuildError
        If neither can be built, or CUDA's cannot and architectures were asked for.
    """
    archs = toolchain.requested_archs() if options.archs is None else toolchain.parse_archs(options.archs)
    asked = bool(archs)
    if not archs and torch.cuda.is_available() and torch.version.hip is None:
        cards = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = tuple(dict.fromkeys(map(toolchain.arch_for, cards)))
    builds: dict[str, Callable[[], Path]] = {
        "C++ kernels of the CPU": partial(build_cpu_kernels, verbose=True),
        "CUDA C++ kernels": partial(build_kernels, archs or None, verbose=True),
    }
    left_out: dict[str, BuildError] = {}
    for name, run in builds.items():
        began = time.perf_counter()
        try:
            path = run()
        except BuildError as error:
            if name.startswith("CUDA") and asked:
                raise
            left_out[name] = error
        else:
            print(f"Built {path} in {time.perf_counter() - began:.0f} s.")
    told = "\n".join(f"The {name} are left out: {error}" for name, error in left_out.items())
    if len(left_out) == len(builds):
        raise BuildError(told)
    if told:
        print(told)
