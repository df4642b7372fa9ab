"""What the compiler makes of a launch on a card that is not there.

`compiled_for` puts a driver in place that compiles and records instead of launching, so the *real* host code runs, with
meta tensors of any size, and every kernel is specialised (alignment, strides, constants) as a launch on that card would
be. The cuobjdump and nvdisasm inside the triton wheel (3.6 to 3.9) then read registers, stack and instructions.

    with compiled_for("sm_90") as launches:
        launch_something(q, k, config=...)
    assert launches[0].stack == 0 and launches[0].count("HGMMA") > 0
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

__all__ = ["CARDS", "SHARED_LIMIT", "Launch", "compiled_for"]


class Card(NamedTuple):
    """One multiprocessor: bytes of shared memory for all programs, and warps."""

    shared: int
    warps: int


CARDS = {"sm_80": Card(167_936, 64), "sm_90": Card(233_472, 64), "sm_100": Card(233_472, 64)}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Shared memory that one program may use, bytes.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
NOT_A_DEVICE = 1000  # triton keeps compiled kernels by device number; these belong to no card


@dataclass
class Launch:
    """One recorded launch of one compiled kernel.

    Attributes
    ----------
    name : str
        The kernel's.
    grid : (int, int, int)
    card : str
        What it was compiled for.
    registers, stack, shared : int
        Per thread; bytes per thread (spills land here); bytes per program.
    warps, columns : int
        Of one program; its columns of tensor memory (Blackwell).
    steps : Counter
        Matrix instructions by their shape, rows x columns x depth, e.g. ``"64x128x16"``; those of NVIDIA.
    instructions : Counter
        Full opcodes with their modifiers, e.g. ``"LDGSTS.E.BYPASS.128"``.
    """

    name: str
    grid: tuple[int, int, int]
    card: str
    registers: int
    stack: int
    shared: int
    warps: int = 0
    columns: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    instructions: Counter[str] = field(repr=False, default_factory=Counter)

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the regular expression from its start."""
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))

    def serialized(self) -> bool:
        """Whether every asynchronous matrix instruction of Hopper stands alone between a fence and a wait.

        ptxas says so in a warning (C7515) that nobody sees: with the pipeline in order, one fence (ARRIVE) opens a
        whole product of C / 16 instructions, of which there are two or more.
        """
        return 2 * self.count("WARPGROUP.ARRIVE") > self.count("HGMMA")

    def programs(self) -> int:
        """How many a multiprocessor holds at once, by registers, shared memory, warps and tensor memory."""
        card = CARDS[self.card]
        # registers are dealt out 256 at a time to a warp, and warps four at a time
        a_warp = -(-32 * self.registers // 256) * 256
        bounds = [
            65_536 // a_warp // 4 * 4 // self.warps,
            card.warps // self.warps,
            card.shared // (self.shared + 1024),
        ]
        if self.columns:
            bounds.append(512 // self.columns)
        return min(bounds)


@contextmanager
def compiled_for(card: str) -> Iterator[list[Launch]]:
    """Within this context Triton launches are compiled for `card` ("sm_80", ...) and recorded.

    Without the source lines of instructions, which nobody reads here; the instructions are the same.

    Raises triton's OutOfResources, as on the card, where the shared memory does not suffice.
    """
    assert not triton.knobs.runtime.interpret, "interpreted kernels cannot be compiled: use a process of its own"
    config = triton.runtime.driver
    loading = triton.knobs.runtime.kernel_load_start_hook
    previous, recorder = config._active, _Recorder(card)
    config.set_active(recorder)
    loading.add(recorder.note_files)
    try:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True
            yield recorder.launches
    finally:
        loading.remove(recorder.note_files)
        config.set_active(previous)


class _Recorder(DriverBase):
    """A driver that writes down what it is asked to launch."""

    def __init__(self, card: str) -> None:
        self.card = card
        self.launches: list[Launch] = []
        self.files: dict[str, str] = {}
        self.utils = self
        self.launcher_cls = _Launcher

    def note_files(self, module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        self.files = files

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, Any, int, int, int]:
        if TARGETS[self.card].backend == "cuda":
            measured = _measure_cubin(binary, self.text(".ptx"))
        else:
            measured = _measure_amdgcn(self.text(".amdgcn"))
        return None, {"name": name, "shared": shared, **measured}, 0, 0, 1024

    def text(self, ending: str) -> str:
        """One of the files that the kernel went through."""
        return Path(next(path for name, path in self.files.items() if name.endswith(ending))).read_text()

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.card], "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self) -> int:
        return NOT_A_DEVICE + list(TARGETS).index(self.card)

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def unload_module(self, module: Any) -> None: ...

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.card]

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed on a card that is not there")


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, x: int, y: int, z: int, stream: int, measured: dict[str, Any], *arguments: Any) -> None:
        # A kernel is loaded once and launched often: the record belongs to the driver that is active now.
        triton.runtime.driver.active.launches.append(
            Launch(grid=(x, y, z), card=triton.runtime.driver.active.card, **measured)
        )


@cache
def _measure_cubin(cubin: bytes, ptx: str) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        assembly = _output(tools / "nvdisasm", "--print-code", "--no-dataflow", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # "/*0250*/  @!P0 LDGSTS.E.BYPASS.128 [R3], ..." after optional scheduling braces
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+[{]?\s*(?:@!?U?P[T\d]+\s+)?([A-Z][A-Za-z0-9_.]*)", assembly)
    columns = re.findall(r"tcgen05\.alloc\S+ \[\S+\], (\d+);", ptx)
    return {
        "registers": registers, "stack": stack, "instructions": Counter(opcodes), "steps": _steps(opcodes, ptx),
        "warps": int(re.search(r"\.reqntid (\d+)", ptx)[1]) // 32, "columns": sum(map(int, columns)),
    }  # fmt: skip


def _steps(opcodes: list[str], ptx: str) -> Counter[str]:
    """Shapes of the matrix instructions: Ampere's and Hopper's say theirs, Blackwell's stands in a descriptor."""
    found: Counter[str] = Counter()
    for opcode in opcodes:
        if opcode.startswith("HGMMA"):
            found[opcode.split(".")[1]] += 1
        elif opcode.startswith("HMMA.16816"):
            found["16x8x16"] += 1
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx))
    for register in re.findall(r"tcgen05\.mma\S+ \[[^]]*\], (?:\[[^]]*\]|\S+), \S+, (%r\d+),", ptx):
        described = int(constants[register])
        found[f"{16 * (described >> 24 & 31)}x{8 * (described >> 17 & 63)}x16"] += 1
    return found


def _measure_amdgcn(assembly: str) -> dict[str, Any]:
    registers, stack = (
        int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
    )
    opcodes = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)\s", assembly, flags=re.MULTILINE)
    return {"registers": registers, "stack": stack, "instructions": Counter(opcodes)}


def _output(tool: Path, *args: str) -> str:
    return subprocess.run([str(tool), *args], capture_output=True, text=True, check=True).stdout
