"""The wheel: with the libraries that have a compiler, pure Python where there is none; both can build on first use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_ref_attn.kernels.places import content_key, source_directory

from .wheels import ARCHS, ROOT, build_wheel, carried, members, whole_wheel


@pytest.mark.early
def test_a_wheel_with_both_libraries(nvcc: str, tmp_path: Path) -> None:
    wheel, said = whole_wheel()
    assert re.fullmatch(r"sparse_ref_attn-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    libraries = {"sparse_ref_attn/lib/libsra_kernels.so", "sparse_ref_attn/lib/libsra_cpu.so"}
    assert {*libraries, *carried()} <= members(wheel)
    assert "rows.cu" in said
    assert "attend.cpp" in said
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    code = """
import sys
from sparse_ref_attn.kernels import cpu_library
from sparse_ref_attn.kernels.library import library
from sparse_ref_attn.kernels.places import CPU_LIBRARY, bundled_library, content_key, source_directory
loaded = library()
assert loaded.path == bundled_library(), loaded.path
assert cpu_library.library().path == bundled_library(CPU_LIBRARY)
assert "torch" not in sys.modules
print(";".join(loaded.archs), content_key(source_directory()), sys.prefix)
"""
    environment = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split(maxsplit=2) == [";".join(ARCHS), content_key(source_directory()), f"{tmp_path / 'venv'}\n"]


def test_a_wheel_without_nvcc_is_pure_python_and_says_so_once(tmp_path: Path) -> None:
    wheel, said = build_wheel(tmp_path, SRA_BUILD_KERNELS="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.startswith("sparse_ref_attn/lib/") for name in members(wheel))
    assert carried() <= members(wheel)  # for `sra build-kernels`
    assert {"sparse_ref_attn/py.typed", "sparse_ref_attn/__init__.pyi"} <= members(wheel)
    code = "import sparse_ref_attn as sra; print(sra.__file__, sra.ConfigError, sra.errors.LayoutError)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(str(wheel))  # the public names are found in an archive, too
    assert said.count("the CUDA C++ kernels are left out (ninja_build.md)") == 1
    assert said.count("the C++ kernels of the CPU are left out (ninja_build.md)") == 1


def test_a_setting_that_is_none_of_the_three() -> None:
    environment = {**os.environ, "SRA_BUILD_KERNELS": "yes"}
    command = [sys.executable, "setup.py", "--version"]
    bad = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert bad.returncode != 0
    assert "SRA_BUILD_KERNELS must be 0, 1 or auto, got 'yes'" in bad.stderr
