"""Tools that a test needs and a machine may not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_ref_attn.kernels.build import build_library
from sparse_ref_attn.kernels.library import Library
from sparse_ref_attn.kernels.places import LIBRARY
from sparse_ref_attn.kernels.toolchain import find_nvcc
from tests.builds import made

from . import stand_in
from .wheels import ARCHS, library_of


@pytest.fixture(scope="session")
def nvcc() -> str:
    """nvcc; the test is skipped aloud without one."""
    found = find_nvcc()
    if found is None:
        pytest.skip("nvcc not found: kernels cannot be compiled on this machine")
    return found


@pytest.fixture(scope="session")
def small(nvcc: str) -> Path:
    """A library of the stand-in, compiled for sm_80."""

    def build(home: Path) -> None:
        build_library(home / "small.so", home / "ninja", ["80"], stand_in.write(home / "csrc"))

    return made("small", build) / "small.so"


class Built:
    """The kernels of csrc, compiled when they are first asked for: those of the wheel's architectures, or one alone."""

    def path(self, arch: str) -> Path:
        """The library with code for `arch`."""
        archs = ARCHS if arch in ARCHS else (arch,)

        def build(folder: Path) -> None:
            if arch in ARCHS:
                library_of(LIBRARY, folder)
            else:
                build_library(folder / LIBRARY, folder / "ninja", archs)
            assert Library(folder / LIBRARY).archs == archs

        return made("-".join(("nvcc", *archs)), build) / LIBRARY


@pytest.fixture(scope="session")
def built(nvcc: str) -> Built:
    return Built()
