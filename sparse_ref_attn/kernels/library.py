"""The shared library, loaded by ctypes on first use; what is in the way is said in words."""

from __future__ import annotations

import ctypes
from pathlib import Path

from ..errors import BuildError, KernelError
from .abi import FUNCTIONS, VERSION, Code
from .loaded import REBUILD, Finder, Loaded
from .places import bundled_library, cached_library

__all__ = ["Library", "library"]


class Library(Loaded):
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

    header, prefix, functions, version = "sra.h", "sra", FUNCTIONS, VERSION

    def __init__(self, path: Path, device: str = "cuda") -> None:
        super().__init__(path)
        self.device = device
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
        raise self._refusal(code, name, self.error_string(code))

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


library = Finder(Library, lambda: (cached_library(), bundled_library()), "CUDA C++")
"""The library of this process: the one in the user's cache, else the one that the installed package carries."""
