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
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

__all__ = ["SHARED_LIMIT", "Launch", "compiled_for"]

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
    registers, stack, shared : int
        Per thread; bytes per thread (spills land here); bytes per program.
    instructions : Counter
        Full opcodes with their modifiers, e.g. ``"LDGSTS.E.BYPASS.128"``.
    """

    name: str
    grid: tuple[int, int, int]
    registers: int
    stack: int
    shared: int
    instructions: Counter[str] = field(repr=False)

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the regular expression from its start."""
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))


@contextmanager
def compiled_for(card: str) -> Iterator[list[Launch]]:
    """Within this context Triton launches are compiled for `card` ("sm_80", ...) and recorded.

    Raises triton's OutOfResources, as on the card, where the shared memory does not suffice.
    """
    assert not triton.knobs.runtime.interpret, "interpreted kernels cannot be compiled: use a process of its own"
    config = triton.runtime.driver
    loading = triton.knobs.runtime.kernel_load_start_hook
    previous, recorder = config._active, _Recorder(card)
    config.set_active(recorder)
    loading.add(recorder.note_files)
    try:
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
        measure = _measure_cubin if TARGETS[self.card].backend == "cuda" else _measure_amdgcn
        return None, {"name": name, "shared": shared, **measure(binary, self.files)}, 0, 0, 1024

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
        triton.runtime.driver.active.launches.append(Launch(grid=(x, y, z), **measured))


def _measure_cubin(cubin: bytes, files: dict[str, str]) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        assembly = _output(tools / "nvdisasm", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # "/*0250*/  @!P0 LDGSTS.E.BYPASS.128 [R3], ..." after optional scheduling braces
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+[{]?\s*(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)", assembly)
    return {"registers": registers, "stack": stack, "instructions": Counter(opcodes)}


def _measure_amdgcn(binary: bytes, files: dict[str, str]) -> dict[str, Any]:
    assembly = Path(next(path for name, path in files.items() if name.endswith(".amdgcn"))).read_text()
    registers, stack = (
        int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
    )
    opcodes = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)\s", assembly, flags=re.MULTILINE)
    return {"registers": registers, "stack": stack, "instructions": Counter(opcodes)}


def _output(tool: Path, *args: str) -> str:
    return subprocess.run([str(tool), *args], capture_output=True, text=True, check=True).stdout
