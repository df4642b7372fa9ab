"""A shared library of kernels, loaded by ctypes: its functions have their types, its version is that of the header."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ..errors import BuildError, ConfigError, LayoutError, VersionError
from .abi import Code

__all__ = ["REBUILD", "Finder", "Loaded"]

L = TypeVar("L")
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


class Finder(Generic[L]):
    """The library of this process, loaded when it is first asked for; what stands in its way is found once, too.

    Parameters
    ----------
    load : callable
        A path to the loaded library.
    paths : callable
        Where it may lie, the best place first.
    kernels : str
        What it holds, in words.

    Notes
    -----
    Dispatch asks in every call, and a file that is not there would be looked for each time.
    """

    def __init__(self, load: Callable[[Path], L], paths: Callable[[], Iterable[Path]], kernels: str) -> None:
        self._load, self._paths, self._kernels = load, paths, kernels
        self._found: L | None = None
        self._fault: tuple[type[BuildError | VersionError], str] | None = None

    def __call__(self) -> L:
        """The library.

        Raises
        ------
        BuildError
            If there is none, or it cannot be loaded.
        VersionError
            If it was built from another version of the header.
        """
        if self._fault is not None:
            kind, words = self._fault
            raise kind(words)
        if self._found is None:
            try:
                self._found = self._load(self._first())
            except (BuildError, VersionError) as error:
                self._fault = type(error), str(error)
                raise
        return self._found

    def forget(self) -> None:
        """Look again: a library was built."""
        self._found = self._fault = None

    def _first(self) -> Path:
        for path in self._paths():
            if path.is_file():
                return path
        raise BuildError(f"the library of {self._kernels} kernels must be built first, got none; {REBUILD}")
