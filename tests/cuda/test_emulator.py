"""The emulator by itself: the kernel of its README, and what it says of bugs planted in that."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from .emulated import CSRC, compile_kernels

README = (CSRC / "emulator" / "README.md").read_text()
(ROW_SUMS,) = re.findall(r"```cuda\n(// row_sums.cu.*?)```", README, re.DOTALL)
SYNC = "  __syncthreads();\n"
BASE = "  if (thread % 32 == 0) sra::store_shared(sra::shared_memory() + thread / 32 * 4, sum);\n"
WRITE = "  if (thread == 1) sra::store_shared(4, 1.0f);\n"
READ = "  if (thread == 0) sra::load_shared(4);\n" + SYNC + BASE
#: One line changed, and what is said of it.
CHANGES = {
    "a collective of some lanes": (
        "mask /= 2) sum",
        "mask /= 2) if (thread % 2 || mask > 4) sum",
        r"divergent warp collective",
    ),
    "a barrier of some lanes": (
        SYNC,
        "  if (thread % 32 < 7) __syncthreads();\n  sra::shfl_xor(sum, 1);\n",
        r"divergent warp collective",
    ),
    "an ordinary load": ("sra::load_global(row + 64 + thread)", "*(row + 64 + thread)", ""),
    "a misaligned store": ("thread / 32 * 4, sum", "thread / 32 * 2, sum", r"misaligned shared memory access: byte 2"),
    "a store out of bounds": (
        "thread / 32 * 4, sum",
        "thread / 32 * 8, sum",
        r"shared memory access out of bounds: bytes 8 to 12 of 8",
    ),
    "two writers": (
        "if (thread == 0)",
        "if (thread < 2)",
        r"race: global memory at .* is written, and another thread wrote it",
    ),
    "a write into an operand": (
        "out + blockIdx.x,",
        "const_cast<float*>(x) + (out ? blockIdx.x : 0),",
        r"announced to be read only",
    ),
    "too much shared memory": (
        "config.dynamicSmemBytes = 8",
        "config.dynamicSmemBytes = 50000",
        r"at most the 49152 bytes",
    ),
    "a block of no whole warps": ("config.blockDim = dim3(64)", "config.blockDim = dim3(48)", r"whole warps, got 48"),
    "a store of every lane": (
        "if (thread % 32 == 0) sra",
        "sra",
        r"race: shared memory at byte \d is written, and thread \d+ wrote it",
    ),
    # lane 0 of a warp reads what lane 1 wrote: a race until the warp met
    "an exchange without syncwarp": (BASE, WRITE + "  sra::shfl_xor(sum, 1);\n" + READ, "race"),
    "an exchange after syncwarp": (BASE, WRITE + "  __syncwarp();\n" + READ, ""),
}


def changed(old: str, new: str) -> str:
    assert old in ROW_SUMS
    return ROW_SUMS.replace(old, new)


class RowSums:
    """The README's kernel, or changes of it, compiled from `text`."""

    def __init__(self, folder: Path, text: str) -> None:
        source = folder / "row_sums.cu"
        source.write_text(text)
        self.loaded = ctypes.CDLL(str(compile_kernels(folder, [source], f"-I{CSRC}")))
        self.loaded.emulator_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self.loaded.emulator_report.restype = ctypes.c_char_p

    def __call__(
        self, seed: int = 1, announced: int = 3, name: str = "row_sums"
    ) -> tuple[torch.Tensor, torch.Tensor, str]:
        run = getattr(self.loaded, f"run_{name}")
        run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
        x, out = torch.randn(3, 128), torch.full((3,), float("nan"))
        self.loaded.emulator_schedule(ctypes.c_uint64(seed), 2)
        self.loaded.emulator_forget_memory()
        self.loaded.emulator_memory(x.data_ptr(), announced * 512, 0)
        self.loaded.emulator_memory(out.data_ptr(), 12, 1)
        code = run(x.data_ptr(), out.data_ptr(), 3)
        report = self.loaded.emulator_report().decode()
        assert bool(code) == bool(report)
        return x, out, report


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> RowSums:
    """All of `CHANGES`, each under a name of its own."""
    texts = [changed(old, new).replace("row_sums", f"row_sums_{n}") for n, (old, new, _) in enumerate(CHANGES.values())]
    return RowSums(tmp_path_factory.mktemp("changes"), "\n".join(texts))


def test_the_readmes_kernel_runs(tmp_path: Path) -> None:
    row_sums = RowSums(tmp_path, ROW_SUMS)
    for seed in range(5):
        x, out, report = row_sums(seed)
        assert not report
        torch.testing.assert_close(out, x.sum(1))
    assert "out of bounds" in row_sums(announced=2)[2]


def test_the_command_of_the_pages_makes_a_library(tmp_path: Path) -> None:
    """One command, but for where the library goes; here csrc has one kernel file, and `shipped` has all."""
    commands = set()
    for page in (CSRC / "emulator" / "README.md", CSRC.parent / "CONTRIBUTING.md"):
        (command,) = re.findall(r"^csrc/emulator/compile \S+ csrc/\*\.cu", page.read_text(), re.MULTILINE)
        commands.add(re.sub(r" \S+\.so ", f" {tmp_path / 'kernels.so'} ", command))
    (command,) = commands
    for folder in ("emulator", "include"):
        shutil.copytree(CSRC / folder, tmp_path / "csrc" / folder)
    for source in (*CSRC.glob("*.h"), CSRC / "device.cuh", CSRC / "errors.cu"):
        shutil.copy(source, tmp_path / "csrc")
    environment = {**os.environ, "CXXFLAGS": "-O0"}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    assert ctypes.CDLL(str(tmp_path / "kernels.so")).sra_version() == 1


def test_the_readmes_diagnosis_is_what_it_says(tmp_path: Path) -> None:
    says = re.findall(r"`((?:thread 0 reads|race:).*?)`", README)
    row_sums = RowSums(tmp_path, changed(SYNC, "\n"))
    reports = [row_sums(seed)[2] for seed in range(8)]
    assert all(any(report.startswith(text) for text in says) for report in reports), reports
    assert all(any(report.startswith(text) for report in reports) for text in says), says


@pytest.mark.parametrize("name", CHANGES)
def test_a_diagnosis(changes: RowSums, name: str) -> None:
    number, diagnosis = list(CHANGES).index(name), CHANGES[name][2]
    for seed in range(3):
        report = changes(seed, name=f"row_sums_{number}")[2]
        assert re.search(diagnosis, report) if diagnosis else not report, report
