"""Settings live in pyproject.toml; here the kernels are compiled where there are compilers (ninja_build.md)."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # the package imports without torch

from sparse_ref_attn.errors import BuildError  # noqa: E402
from sparse_ref_attn.kernels.cpu_build import build_cpu_library, find_compiler  # noqa: E402
from sparse_ref_attn.kernels.places import CPU_LIBRARY, LIBRARY, installed_sources  # noqa: E402
from sparse_ref_attn.kernels.toolchain import find_nvcc  # noqa: E402

CSRC = ROOT / "csrc"


def compiled() -> list[str]:
    """The libraries to build. SRA_BUILD_KERNELS: 0 none, 1 both, else those whose compiler is found."""
    asked = os.environ.get("SRA_BUILD_KERNELS", "auto")
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"SRA_BUILD_KERNELS must be 0, 1 or auto, got {asked!r}")
    if asked == "1":
        return [CPU_LIBRARY, LIBRARY]
    if asked == "0" or sys.platform != "linux":
        return []
    return [CPU_LIBRARY] * has_compiler() + [LIBRARY] * (find_nvcc() is not None)


def has_compiler() -> bool:
    try:
        return bool(find_compiler())
    except BuildError:
        return False


COMPILED = compiled()


class BuildWithKernels(build_py):
    """Adds the sources of the kernels to the package, and the libraries that can be built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            print("sparse_ref_attn: editable, so no kernels are compiled; `sra build-kernels` does it")
            return
        package = Path(self.build_lib) / "sparse_ref_attn"
        for path in installed_sources(CSRC):
            target = package / "csrc" / path.relative_to(CSRC)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        without = {LIBRARY: ("CUDA C++ kernels", "nvcc"), CPU_LIBRARY: ("C++ kernels of the CPU", "C++ compiler")}
        for name, (kernels, tool) in without.items():
            if name not in COMPILED:
                why = f"there is no {tool}" if sys.platform == "linux" else "they are compiled on Linux alone"
                why = "SRA_BUILD_KERNELS is 0" if os.environ.get("SRA_BUILD_KERNELS") == "0" else why
                print(f"sparse_ref_attn: {why}, so the {kernels} are left out (ninja_build.md)")
        if CPU_LIBRARY in COMPILED:
            build_cpu_library(package / "lib" / CPU_LIBRARY, CSRC, verbose=True)
        if LIBRARY in COMPILED:
            from sparse_ref_attn.kernels.build import build_library

            work = Path(self.get_finalized_command("build").build_temp) / "kernels"
            build_library(package / "lib" / LIBRARY, work.resolve(), sources=CSRC, verbose=True)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        package = Path(self.build_lib) / "sparse_ref_attn"
        added = [package / "csrc" / path.relative_to(CSRC) for path in installed_sources(CSRC)]
        return super().get_outputs(include_bytecode) + [
            str(p) for p in (*added, package / "lib" / LIBRARY, package / "lib" / CPU_LIBRARY) if p.exists()
        ]

    def get_source_files(self) -> list[str]:
        return super().get_source_files() + [str(path.relative_to(ROOT)) for path in installed_sources(CSRC)]


class KernelDistribution(Distribution):
    """Belongs to one platform where it carries a library."""

    def has_ext_modules(self) -> bool:
        return bool(COMPILED)


class AnyPython(bdist_wheel):
    """The libraries are plain C, so the wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if COMPILED else (python, abi, platform)


setup(distclass=KernelDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython})
