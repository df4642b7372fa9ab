"""What compiles the kernels: nvcc, ninja, and the architectures to compile for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import BuildError

__all__ = [
    "DEFAULT_ARCHS",
    "PTX",
    "Toolchain",
    "arch_for",
    "find_nvcc",
    "find_toolchain",
    "parse_archs",
    "requested_archs",
    "serves",
]

#: The PTX of the first serves every card without machine code of its own, 10.3 and 12.x among them.
DEFAULT_ARCHS = ("80+PTX", "90a", "100a")
PTX = "+PTX"


@dataclass(frozen=True)
class Toolchain:
    """Paths of nvcc and ninja; nvcc's version, e.g. "13.0.88"; the virtual architectures it knows, e.g. "90a"."""

    nvcc: str
    version: str
    ninja: str
    knows: frozenset[str]

    def archs(self, asked: Sequence[str] | None = None) -> tuple[str, ...]:
        """Architectures to compile for: `asked`, else those of SRA_CUDA_ARCHS, else every default that nvcc knows.

        Raises
        ------
        BuildError
            If nvcc does not know one that was asked for, or none of the defaults.
        """
        if asked is None:
            asked = requested_archs()
        unknown = [arch for arch in asked if arch.removesuffix(PTX) not in self.knows]
        if unknown:
            raise BuildError(
                f"nvcc {self.version} must know every architecture that is asked for, got {';'.join(unknown)}; "
                f"it knows {';'.join(_sorted(self.knows))}"
            )
        archs = tuple(asked) or tuple(arch for arch in DEFAULT_ARCHS if arch.removesuffix(PTX) in self.knows)
        if not archs:
            raise BuildError(
                f"nvcc must know one of the architectures {';'.join(DEFAULT_ARCHS)}, got nvcc {self.version}, "
                f"which knows {';'.join(_sorted(self.knows))}"
            )
        return archs


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of /usr/local/cuda; None where there is none."""
    homes = [os.environ["CUDA_HOME"]] if os.environ.get("CUDA_HOME") else []
    found = (shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes)
    return next(filter(None, found), None) or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_toolchain() -> Toolchain:
    """nvcc and ninja of this machine.

    Raises
    ------
    BuildError
        If one of them is missing, or nvcc does not run.
    """
    nvcc, ninja = find_nvcc(), _find_ninja()
    if nvcc is None:
        raise BuildError(
            "nvcc must be on PATH, under CUDA_HOME/bin or under /usr/local/cuda/bin, got none: install the CUDA "
            "toolkit (12.8 or later for all default architectures)"
        )
    if ninja is None:
        raise BuildError("ninja must be on PATH or installed as the package ninja, got neither: pip install ninja")
    version = re.search(r"V(\d+\.\d+\.\d+)", _output(nvcc, "--version"))
    if version is None:
        raise BuildError(f"{nvcc} --version must name its version, got none")
    knows = re.findall(r"compute_(\w+)", _output(nvcc, "--list-gpu-arch"))
    return Toolchain(nvcc, version[1], ninja, frozenset(knows) | {f"{arch}a" for arch in knows if int(arch) >= 90})


def requested_archs() -> tuple[str, ...]:
    """What SRA_CUDA_ARCHS asks for; empty where it is not set."""
    return parse_archs(os.environ.get("SRA_CUDA_ARCHS", ""))


def parse_archs(text: str) -> tuple[str, ...]:
    """Architectures by the digits of their compute capability, separated by semicolons, commas or spaces.

    ``+PTX`` adds code that the driver compiles for any later card when it first loads it.

    Examples
    --------
    >>> parse_archs("80+PTX;90a")
    ('80+PTX', '90a')
    >>> parse_archs("9.0")
    Traceback (most recent call last):
    sparse_ref_attn.errors.BuildError: an architecture must be digits and perhaps a letter or +PTX, such as 80, 90a or
    80+PTX, got '9.0'
    """
    archs = tuple(dict.fromkeys(filter(None, re.split(r"[;,\s]+", text))))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}(a|\+PTX)?", arch):
            raise BuildError(
                f"an architecture must be digits and perhaps a letter or +PTX, such as 80, 90a or 80+PTX, got {arch!r}"
            )
    return archs


def arch_for(capability: tuple[int, int]) -> str:
    """The architecture to compile for a card of this compute capability.

    Examples
    --------
    >>> arch_for((8, 6)), arch_for((9, 0)), arch_for((10, 0)), arch_for((12, 0))
    ('80', '90a', '100a', '120')
    """
    exact = "".join(map(str, capability))
    if f"{exact}a" in DEFAULT_ARCHS:
        return f"{exact}a"
    return "80" if capability[0] == 8 else exact


def serves(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` runs on a card: the same major version and no later minor one; exactly that card where
    a letter is added; that card and every later one where PTX is.

    Examples
    --------
    >>> serves("80", (8, 9)), serves("86", (8, 0)), serves("90a", (9, 0)), serves("100a", (10, 3))
    (True, False, True, False)
    >>> serves("80+PTX", (12, 0))
    True
    """
    major, minor = divmod(int(arch.removesuffix(PTX).rstrip("a")), 10)
    if arch.endswith(PTX):
        return capability >= (major, minor)
    if arch.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def _find_ninja() -> str | None:
    found = shutil.which("ninja")
    if found or find_spec("ninja") is None:
        return found
    import ninja

    return shutil.which("ninja", path=ninja.BIN_DIR)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise BuildError(f"{command[0]} must be a program that runs, got {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} must succeed, got {error.stderr.strip() or error}") from error


def _sorted(archs: frozenset[str]) -> list[str]:
    return sorted(archs, key=lambda arch: (int(arch.rstrip("a")), arch))
