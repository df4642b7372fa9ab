"""Where the sources of the kernels and the libraries built from them lie."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

__all__ = [
    "LIBRARY",
    "bundled_library",
    "cached_library",
    "content_key",
    "installed_sources",
    "source_directory",
    "source_files",
]

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = "libsra_kernels.so"


def source_directory() -> Path:
    """csrc of a checkout, or the copy that an installed package carries."""
    carried = PACKAGE / "csrc"
    return carried if carried.is_dir() else PACKAGE.parent / "csrc"


def source_files(directory: Path) -> list[Path]:
    """The files that are compiled, one object each."""
    return sorted(directory.glob("*.cu"))


def installed_sources(directory: Path) -> list[Path]:
    """Everything that a build reads: sources and headers, without the emulator."""
    return [path for pattern in ("*.cu", "*.cuh", "*.h", "include/*.h") for path in sorted(directory.glob(pattern))]


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


def bundled_library() -> Path:
    """Where an installed package carries its library; it need not exist."""
    return PACKAGE / "lib" / LIBRARY


def cached_library() -> Path:
    """Where `build_kernels` puts the library of these sources; it need not exist.

    Examples
    --------
    >>> cached_library().name
    'libsra_kernels.so'
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sparse_ref_attn" / "kernels" / content_key(source_directory()) / LIBRARY
