"""Tools that a test needs and a machine may not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_ref_attn.kernels.build import build_library
from sparse_ref_attn.kernels.toolchain import find_nvcc

from . import stand_in


@pytest.fixture(scope="session")
def nvcc() -> str:
    """nvcc; the test is skipped aloud without one."""
    found = find_nvcc()
    if found is None:
        pytest.skip("nvcc not found: kernels cannot be compiled on this machine")
    return found


@pytest.fixture(scope="session")
def small(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of the stand-in, compiled for sm_80."""
    home = tmp_path_factory.mktemp("small")
    return build_library(home / "small.so", home / "ninja", ["80"], stand_in.write(home / "csrc"))
