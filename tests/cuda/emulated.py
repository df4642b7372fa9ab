"""The shipped kernels on this CPU: csrc compiled with the emulator, behind the library's own Python.

`Emulated` is the library of kernels as the package loads it, but for where it runs. Before each launch it announces to
the emulator exactly the memory of the tensors that the launch was given, written or read only, so that a kernel which
touches anything else is stopped.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from sparse_ref_attn.kernels import abi
from sparse_ref_attn.kernels.library import Library
from sparse_ref_attn.ops.attention_mass.impl import cuda as mass
from sparse_ref_attn.ops.gather_attention.impl import cuda as attention
from sparse_ref_attn.ops.pack_rows.impl import cuda as rows
from sparse_ref_attn.ops.shared import cuda_launch
from tests.builds import made

__all__ = ["CSRC", "EARLY", "LATE", "MIXED", "Emulated", "compile_kernels", "compile_object", "emulated", "shipped"]

CSRC = Path(__file__).resolve().parents[2] / "csrc"
EARLY, LATE, MIXED = 0, 1, 2  # when an asynchronous copy lands
WRITTEN = {
    "sra_gather_attention": ("out", "lse"),
    "sra_attention_lse": ("lse",),
    "sra_attention_mass": ("mass", "mean"),
}


def compile_kernels(folder: Path, sources: list[Path], *flags: str) -> Path:
    """Kernels and the emulator in one library in `folder`."""
    return _compile(folder / "kernels.so", [compile_object(CSRC / "emulator" / "emulator.cpp"), *sources], *flags)


def compile_object(source: Path) -> Path:
    """What many libraries share: a file of csrc by itself."""
    name = f"{source.stem}.o"
    return made(name, lambda folder: _compile(folder / name, [source])) / name


def _compile(target: Path, sources: list[Path], *flags: str) -> Path:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("g++ not found: the emulator cannot be compiled on this machine")
    command = [CSRC / "emulator" / "compile", target, *sources]
    environment = {**os.environ, "CXXFLAGS": " ".join(flags)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr, done.stderr
    return target


@cache
def shipped() -> Emulated:
    """Every kernel of csrc."""
    built = made("emulated", lambda folder: compile_kernels(folder, sorted(CSRC.glob("*.cu"))))
    return Emulated(built / "kernels.so")


class Emulated(Library):
    """A library that `compile_kernels` made; it may hold some of the functions only."""

    def __init__(self, path: Path) -> None:
        self.path, self.device, self.archs, self.built_by = path, "cpu", (), "g++"
        self.seed, self.copies = 1, MIXED
        self.announced: list[tuple[int, int]] = []
        self._loaded = ctypes.CDLL(str(path))
        for name, (arguments, result) in abi.FUNCTIONS.items():
            if hasattr(self._loaded, name):
                getattr(self._loaded, name).argtypes = arguments
                getattr(self._loaded, name).restype = result
        self._loaded.emulator_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self._loaded.emulator_count.restype = ctypes.c_int64
        self._loaded.emulator_report.restype = ctypes.c_char_p

    def announce(self, x: Tensor | None) -> None:
        """The next launch may touch what `x` covers, from its first element to its last."""
        if x is not None and x.numel():
            reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            self.announced.append((x.data_ptr(), reach * x.element_size()))

    def call(self, name: str, arguments: ctypes.Structure, stream: int) -> None:
        written = self._written(name, arguments)
        self._loaded.emulator_schedule(ctypes.c_uint64(self.seed), self.copies)
        self._loaded.emulator_forget_memory()
        for start, size in self.announced:
            self._loaded.emulator_memory(start, size, start in written)
        self.announced.clear()
        super().call(name, arguments, stream)

    def count(self, event: str) -> int:
        """How often something happened in the last launch."""
        return self._loaded.emulator_count(event.encode())

    @staticmethod
    def _written(name: str, arguments: ctypes.Structure) -> set[int | None]:
        if isinstance(arguments, abi.RowsArgs):
            copies = arguments.copies[: max(arguments.count, 0)] if arguments.copies else ()
            return {c.packed if name == "sra_pack_rows" else c.full for c in copies}
        fields = [getattr(arguments, field) for field in WRITTEN[name]]
        return {x.data if isinstance(x, abi.Tensor) else x for x in fields}


@contextmanager
def emulated(library: Emulated, seed: int = 1, copies: int = MIXED) -> Iterator[Emulated]:
    """Within this context the backend "cuda" runs on `library`, under this schedule, with CPU tensors."""
    library.seed, library.copies = seed, copies
    library.announced.clear()

    real_nested = rows.nested

    def announcing(function: Callable[..., Any]) -> Callable[..., Any]:
        def convert(x: Tensor | None, *strides: int, **named: int) -> Any:
            library.announce(x)
            return function(x, *strides, **named)

        return convert

    def nested(x: Tensor, y: Tensor, dim: int) -> Any:
        library.announce(x)
        library.announce(y)
        return real_nested(x, y, dim)

    with ExitStack() as stack:
        for owner, name, value in (
            (cuda_launch, "library", lambda: library),
            (rows, "nested", nested),
            (rows, "index", announcing(cuda_launch.index)),
            *((attention, name, announcing(getattr(cuda_launch, name))) for name in ("tensor", "index", "pointer")),
            *((mass, name, announcing(getattr(cuda_launch, name))) for name in ("tensor", "pointer")),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield library
