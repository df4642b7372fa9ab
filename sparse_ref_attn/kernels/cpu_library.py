"""The shared library of the CPU's kernels, loaded by ctypes on first use; what is in the way is said in words."""

from __future__ import annotations

import ctypes
from pathlib import Path

from .cpu_abi import FUNCTIONS, TARGETS, VERSION, AttendTilesArgs
from .loaded import Finder, Loaded
from .places import CPU_LIBRARY, bundled_library, cached_library

__all__ = ["CpuLibrary", "library"]


class CpuLibrary(Loaded):
    """The functions of sra_cpu.h.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    target : int
        The most that its kernels may use of the processor, an index of `TARGETS`: the best that this one has.

    Raises
    ------
    BuildError
        If the file cannot be loaded, or lacks a function.
    VersionError
        If it was built from another version of sra_cpu.h.
    """

    header, prefix, functions, version = "sra_cpu.h", "sra_cpu", FUNCTIONS, VERSION

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.target: int = self._loaded.sra_cpu_target()

    @property
    def target_name(self) -> str:
        """What the kernels use of this processor, such as "avx512"."""
        return TARGETS[self.target]

    def room(self, arguments: AttendTilesArgs) -> int:
        """Bytes that `attend_tiles` works in.

        Raises
        ------
        LayoutError, ConfigError
            As `attend_tiles`.
        """
        return self._checked(self._loaded.sra_cpu_attend_tiles_room(ctypes.byref(arguments)))

    def attend_tiles(self, arguments: AttendTilesArgs, room: int, size: int) -> None:
        """Run the kernel in `size` bytes at the address `room`.

        Raises
        ------
        LayoutError
            If it refused a pointer, a size or too little room.
        ConfigError
            If it has no kernel for a dtype, head dim or scale.
        """
        self._checked(self._loaded.sra_cpu_attend_tiles(ctypes.byref(arguments), room, size))

    def exp2(self, x: int, y: int, count: int) -> None:
        """2^x of `count` float32 at the address `x`, to `y`, as the kernels compute it."""
        self._loaded.sra_cpu_exp2(self.target, x, y, count)

    def _checked(self, code: int) -> int:
        if code >= 0:
            return code
        raise self._refusal(code, "sra_cpu_attend_tiles")


library = Finder(CpuLibrary, lambda: (cached_library(CPU_LIBRARY), bundled_library(CPU_LIBRARY)), "C++")
"""The library of this process: the one in the user's cache, else the one that the installed package carries."""
