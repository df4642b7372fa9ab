"""The C++ kernels of the CPU, compiled for the tests; whoever asks for them is skipped aloud without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from sparse_ref_attn.errors import BuildError
from sparse_ref_attn.kernels import cpu_library
from sparse_ref_attn.kernels.cpu_build import build_cpu_library, find_compiler
from sparse_ref_attn.kernels.cpu_library import CpuLibrary
from sparse_ref_attn.kernels.places import CPU_LIBRARY
from sparse_ref_attn.ops.verdicts import fault_of
from tests.builds import made, ready
from tests.kernels.wheels import WHOLE, library_of

__all__ = ["built", "compiler", "library_at", "used"]


def compiler() -> list[str]:
    """The command of the C++ compiler."""
    try:
        return find_compiler()
    except BuildError as error:
        pytest.skip(f"the C++ kernels cannot be compiled on this machine: {error}")


@cache
def built() -> Path:
    """The library of csrc/cpu, that of the wheel where there is one already."""
    compiler()

    def build(folder: Path) -> None:
        if ready(WHOLE):
            library_of(CPU_LIBRARY, folder)
        else:
            build_cpu_library(folder / CPU_LIBRARY)

    return made("cpu", build) / CPU_LIBRARY


@contextmanager
def library_at(path: Path) -> Iterator[None]:
    """The ops find their library there and nowhere else; it need not exist."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "cached_library", lambda name: path)
        patch.setattr(cpu_library, "bundled_library", lambda name: path)
        cpu_library.library.forget()
        fault_of.cache_clear()
        yield
    cpu_library.library.forget()
    fault_of.cache_clear()


@contextmanager
def used(target: int | None = None) -> Iterator[CpuLibrary]:
    """The ops use `built`, with what was compiled for a target; default the best that this processor has."""
    with library_at(built()):
        loaded = cpu_library.library()
        if target is not None:
            if target > loaded.target:
                pytest.skip(f"this processor runs no {cpu_library.TARGETS[target]}")
            loaded.target = target
        yield loaded
