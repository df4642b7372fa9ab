"""The shared library, loaded by ctypes on first use; what is in the way is said in words."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from ..errors import BuildError, ConfigError, KernelError, LayoutError, VersionError
from .abi import FUNCTIONS, VERSION, Code
from .places import bundled_library, cached_library

__all__ = ["Library", "library"]

REBUILD = "`sra build-kernels` builds it (ninja_build.md)"


class Library:
    """The functions of sra.h.

    Parameters
    ----------
    path : Path
    device : {"cuda", "cpu"}
        Where its pointers lie: "cpu" for the kernels compiled for the emulator. Default "cuda".

    Attributes
    ----------
    archs : tuple of str
        Architectures that it holds machine code for, such as "90a"; empty for the emulator.
    built_by : str
        The compiler, such as "nvcc 13.0.88".

    Raises
    ------
    BuildError
        If the file cannot be loaded, or lacks a function.
    VersionError
        If it was built from another version of sra.h.
    """

    def __init__(self, path: Path, device: str = "cuda") -> None:
        self.path, self.device = path, device
        try:
            self._loaded = ctypes.CDLL(str(path))
            for name, (arguments, result) in FUNCTIONS.items():
                function = getattr(self._loaded, name)
                function.argtypes, function.restype = arguments, result
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} must be a library of these kernels, got {error}; {REBUILD}") from error
        if self._loaded.sra_version() != VERSION:
            raise VersionError(
                f"{path} must have version {VERSION} of sra.h, got {self._loaded.sra_version()}; {REBUILD}"
            )
        self.archs, self.built_by = self._build() if device == "cuda" else ((), "g++")

    def call(self, name: str, arguments: ctypes.Structure, stream: int) -> None:
        """Launch one function.

        Raises
        ------
        LayoutError
            If it refused a pointer, a size or a stride.
        ConfigError
            If it has no kernel for a dtype, head dim, scale or option.
        KernelError
            If the device or its driver failed.
        """
        code = getattr(self._loaded, name)(ctypes.byref(arguments), stream)
        if code == Code.OK:
            return
        if code > 0:
            raise KernelError(f"{name} must run on the device, got CUDA error {code}: {self.error_string(code)}")
        said = f"{name}: {self._loaded.sra_last_error().decode() or self.error_string(code)}"
        raise ConfigError(said) if code == Code.UNSUPPORTED else LayoutError(said)

    def error_string(self, code: int) -> str:
        """What a code means."""
        return self._loaded.sra_error_string(code).decode()

    def _build(self) -> tuple[tuple[str, ...], str]:
        """From "90a 100a, nvcc 13.0.88", which the build wrote into the library."""
        try:
            text = ctypes.c_char_p.in_dll(self._loaded, "sra_build").value
        except ValueError as error:
            raise BuildError(f"{self.path} must say what it was built for, got {error}; {REBUILD}") from error
        archs, _, built_by = (text or b"").decode().partition(", ")
        return tuple(archs.split()), built_by


@cache
def library() -> Library:
    """The library of this process: the one in the user's cache, else the one that the installed package carries.

    Raises
    ------
    BuildError
        If there is none, or it cannot be loaded.
    VersionError
        If it was built from another version of sra.h.
    """
    for path in (cached_library(), bundled_library()):
        if path.is_file():
            return Library(path)
    raise BuildError(f"the library of CUDA C++ kernels must be built first, got none; {REBUILD}")
