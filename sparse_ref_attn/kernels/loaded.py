"""A shared library of kernels, loaded by ctypes: its functions have their types, its version is that of the header."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..errors import BuildError, ConfigError, LayoutError, VersionError
from .abi import Code

__all__ = ["REBUILD", "Loaded", "first_of"]

REBUILD = "`sra build-kernels` builds it (ninja_build.md)"


class Loaded:
    """The functions of one header, by name in `_loaded`.

    Parameters
    ----------
    path : Path

    Raises
    ------
    BuildError
        If the file cannot be loaded, or lacks a function.
    VersionError
        If it was built from another version of the header.
    """

    header: ClassVar[str]
    prefix: ClassVar[str]
    """Of the functions that every library has: their version and the last error's words."""
    functions: ClassVar[Mapping[str, tuple[Any, Any]]]
    """Types of the arguments and of the result."""
    version: ClassVar[int]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._loaded = ctypes.CDLL(str(path))
            for name, (arguments, result) in self.functions.items():
                function = getattr(self._loaded, name)
                function.argtypes, function.restype = arguments, result
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} must be a library of these kernels, got {error}; {REBUILD}") from error
        got = getattr(self._loaded, f"{self.prefix}_version")()
        if got != self.version:
            raise VersionError(f"{path} must have version {self.version} of {self.header}, got {got}; {REBUILD}")

    def _refusal(self, code: int, name: str, otherwise: str = "") -> ConfigError | LayoutError:
        """What the function `name` refused with a negative code, in its own words."""
        words = getattr(self._loaded, f"{self.prefix}_last_error")().decode() or otherwise
        return (ConfigError if code == Code.UNSUPPORTED else LayoutError)(f"{name}: {words}")


def first_of(paths: Iterable[Path], kernels: str) -> Path:
    """The first file that there is; raises BuildError where there is none."""
    for path in paths:
        if path.is_file():
            return path
    raise BuildError(f"the library of {kernels} kernels must be built first, got none; {REBUILD}")
