"""Where the sources of the kernels and the libraries built from them lie."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

__all__ = [
    "CPU_LIBRARY",
    "LIBRARY",
    "bundled_library",
    "cached_library",
    "content_key",
    "cpu_source_files",
    "installed_sources",
    "source_directory",
    "source_files",
]

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = "libsra_kernels.so"
CPU_LIBRARY = "libsra_cpu.so"


def source_directory() -> Path:
    """csrc of a checkout, or the copy that an installed package carries."""
    carried = PACKAGE / "csrc"
    return carried if carried.is_dir() else PACKAGE.parent / "csrc"


def source_files(directory: Path) -> list[Path]:
    """The files that nvcc compiles, one object each."""
    return sorted(directory.glob("*.cu"))


def cpu_source_files(directory: Path) -> list[Path]:
    """The files that a C++ compiler compiles for the CPU."""
    return sorted(directory.glob("cpu/*.cpp"))


def installed_sources(directory: Path) -> list[Path]:
    """Everything that a build reads: sources and headers, without the emulator."""
    patterns = ("*.cu", "*.cuh", "*.h", "cpu/*.cpp", "cpu/*.h", "include/*.h")
    return [path for pattern in patterns for path in sorted(directory.glob(pattern))]


@cache
def content_key(directory: Path) -> str:
    """A name for what the sources say, wherever they lie.

    Examples
    --------
    >>> len(content_key(source_directory()))
    16
    """
    digest = hashlib.sha256()
    for path in installed_sources(directory):
        digest.update(f"{path.relative_to(directory).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def bundled_library(name: str = LIBRARY) -> Path:
    """Where an installed package carries a library; it need not exist."""
    return PACKAGE / "lib" / name


def cached_library(name: str = LIBRARY) -> Path:
    """Where `build_kernels` and `build_cpu_kernels` put a library of these sources; it need not exist.

    Examples
    --------
    >>> cached_library().name
    'libsra_kernels.so'
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sparse_ref_attn" / "kernels" / content_key(source_directory()) / name
