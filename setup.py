"""Settings live in pyproject.toml; here the CUDA C++ kernels are compiled where there is an nvcc (ninja_build.md)."""

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

from sparse_ref_attn.kernels.places import LIBRARY, installed_sources  # noqa: E402
from sparse_ref_attn.kernels.toolchain import find_nvcc  # noqa: E402

CSRC = ROOT / "csrc"


def compiles() -> bool:
    """SRA_BUILD_KERNELS: 0 never, 1 always, else where nvcc is found."""
    asked = os.environ.get("SRA_BUILD_KERNELS", "auto")
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"SRA_BUILD_KERNELS must be 0, 1 or auto, got {asked!r}")
    return asked == "1" or (asked == "auto" and sys.platform == "linux" and find_nvcc() is not None)


COMPILES = compiles()


class BuildWithKernels(build_py):
    """Adds the sources of the kernels to the package, and the library where it can be built."""

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
        if not COMPILES:
            why = "SRA_BUILD_KERNELS is 0" if find_nvcc() else "there is no nvcc"
            print(f"sparse_ref_attn: {why}, so the CUDA C++ kernels are left out (ninja_build.md)")
            return
        from sparse_ref_attn.kernels.build import build_library

        work = Path(self.get_finalized_command("build").build_temp) / "kernels"
        build_library(package / "lib" / LIBRARY, work.resolve(), sources=CSRC, verbose=True)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        package = Path(self.build_lib) / "sparse_ref_attn"
        added = [package / "csrc" / path.relative_to(CSRC) for path in installed_sources(CSRC)]
        return super().get_outputs(include_bytecode) + [
            str(p) for p in (*added, package / "lib" / LIBRARY) if p.exists()
        ]

    def get_source_files(self) -> list[str]:
        return super().get_source_files() + [str(path.relative_to(ROOT)) for path in installed_sources(CSRC)]


class KernelDistribution(Distribution):
    """Belongs to one platform where it carries the library."""

    def has_ext_modules(self) -> bool:
        return COMPILES


class AnyPython(bdist_wheel):
    """The library is plain C, so the wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if COMPILES else (python, abi, platform)


setup(distclass=KernelDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython})
