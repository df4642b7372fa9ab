"""What nvcc made of the kernels: registers, stack and instructions of each, read by the tools in the triton wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

__all__ = ["Kernel", "kernels"]


@dataclass
class Kernel:
    """One instantiation: registers a thread; stack, spilled and static shared bytes; full opcodes."""

    registers: int
    stack: int
    local: int
    shared: int
    instructions: Counter[str] = field(repr=False)

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the regular expression from its start."""
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))


def kernels(library: Path, arch: str) -> dict[str, Kernel]:
    """Every kernel of the library for one architecture, by names such as ``"gather_attention<bfloat16, 128>"``."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def said(tool: str, *options: str, folder: str | None = None) -> str:
        command = [str(tools / tool), *options]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout

    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        said("cuobjdump", "-arch", f"sm_{arch}", "--dump-resource-usage", str(library)),
    )
    assembly: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        said("cuobjdump", "-arch", f"sm_{arch}", "--extract-elf", "all", str(library.resolve()), folder=folder)
        for cubin in Path(folder).iterdir():
            _, *parts = re.split(r"\.text\.(\w+):\n", said("nvdisasm", "--print-code", "--no-dataflow", str(cubin)))
            assembly.update(zip(parts[::2], parts[1::2], strict=True))
    # "/*0250*/  @!P0 LDGSTS.E.BYPASS.128 [R3], ..."
    opcode = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)")
    out = {}
    for plain, (name, *numbers) in zip(_plain([name for name, *_ in usage]), usage, strict=True):
        registers, stack, shared, local = map(int, numbers)
        out[plain] = Kernel(registers, stack, local, shared, Counter(opcode.findall(assembly[name])))
    return out


def _plain(mangled: list[str]) -> list[str]:
    """``gather_attention<bfloat16, 128>`` and others from their mangled names."""
    full = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    names = [x.replace("(anonymous namespace)::", "").replace("sra::", "").removeprefix("void ") for x in full]
    return [name[: name.rindex("(")] for name in names]
