"""The C++ kernels of the CPU: built by the compiler that is there, carried by the wheel, and said in words if not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_ref_attn import doctor
from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import BuildError, VersionError
from sparse_ref_attn.kernels import cpu_abi, cpu_build, places
from sparse_ref_attn.kernels.cpu_build import build_cpu_library, find_compiler
from sparse_ref_attn.kernels.cpu_library import CpuLibrary
from tests.cpu_kernels import built, compiler, library_at

ROOT = Path(__file__).resolve().parents[2]
#: What takes the time to compile, once for each target, is beside the point where a build is tested.
NOTHING = """
#include "attend.h"
#define JOINED(name, target) name##_##target
#define NAMED(name, target) JOINED(name, target)
namespace sra_cpu {
void NAMED(attend, SRA_TARGET)(const Block&, float*) {}
void NAMED(exp2, SRA_TARGET)(const float*, float*, int64_t) {}
}
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package believes that its sources are the CPU's alone, of a kernel that does nothing; the cache is empty."""
    compiler()
    for name in ("cpu", "include"):
        shutil.copytree(places.source_directory() / name, tmp_path / "csrc" / name)
    (tmp_path / "csrc" / "cpu" / "attend.cpp").write_text(NOTHING)
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    places.content_key.cache_clear()
    yield tmp_path / "csrc"
    places.content_key.cache_clear()


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_ref_attn.kernels.toolchain.find_nvcc", lambda: None)


def test_the_library_shows_its_functions_and_nothing_else() -> None:
    shown = subprocess.run(["nm", "-D", "--defined-only", built()], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in shown.splitlines()} == set(cpu_abi.FUNCTIONS)


def test_it_loads_without_torch_and_names_what_it_uses() -> None:
    code = (
        "import sys; from pathlib import Path; from sparse_ref_attn.kernels.cpu_library import CpuLibrary\n"
        "print(CpuLibrary(Path(sys.argv[1])).target_name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, built()], cwd=ROOT, capture_output=True, text=True, check=True)
    target, torch_too = done.stdout.split()
    assert target in cpu_abi.TARGETS
    assert torch_too == "False"


def test_a_library_carries_no_code_for_this_machine_alone(
    sources: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    build_cpu_library(tmp_path / "l.so", sources, verbose=True)
    said = capsys.readouterr().out
    assert "native" not in said
    assert len(re.findall(r"-DSRA_TARGET=", said)) in (1, len(cpu_abi.TARGETS))
    for command in said.splitlines():
        if "-DSRA_TARGET" not in command:
            assert "-mavx" not in command  # what asks the processor runs on every one


def test_build_kernels_builds_what_it_can(sources: Path, no_nvcc: None, capsys: pytest.CaptureFixture) -> None:
    assert main(["build-kernels"]) == 0
    said = capsys.readouterr().out
    path = places.cached_library(places.CPU_LIBRARY)
    assert f"Built {path}" in said
    assert "The CUDA C++ kernels are left out: nvcc must be on PATH" in said
    CpuLibrary(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert main(["build-kernels", "--archs", "80"]) != 0
    assert "nvcc must be on PATH" in capsys.readouterr().err


def test_build_kernels_with_no_compiler_at_all(
    sources: Path, no_nvcc: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cpu_build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["build-kernels"]) != 0
    error = capsys.readouterr().err
    assert "The C++ kernels of the CPU are left out: a C++17 compiler with OpenMP must be on PATH" in error
    assert "The CUDA C++ kernels are left out: nvcc must be" in error


def test_a_compiler_that_does_not_compile_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match=r"a C\+\+17 compiler with OpenMP must be on PATH .*, got CXX=false"):
        find_compiler()


def test_a_failed_build_says_why_and_leaves_what_was_there(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "l.so"
    target.parent.mkdir()
    target.write_text("before")
    with (sources / "cpu" / "attend.cpp").open("a") as source:
        source.write("int broken = this_is_no_name;\n")
    with pytest.raises(BuildError, match=r"attend\.cpp .*must succeed, got exit code 1:\n(.|\n)*this_is_no_name"):
        build_cpu_library(target, sources)
    assert target.read_text() == "before"
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(BuildError, match=r"sources of the C\+\+ kernels must lie in .*, got no \.cpp file there"):
        build_cpu_library(target, tmp_path)


def test_the_sources_are_part_of_the_key(sources: Path) -> None:
    first = places.cached_library(places.CPU_LIBRARY)
    with (sources / "cpu" / "attend.h").open("a") as header:
        header.write("// more\n")
    places.content_key.cache_clear()
    assert places.cached_library(places.CPU_LIBRARY) != first


def test_another_version(sources: Path, tmp_path: Path) -> None:
    header = sources / "cpu" / "sra_cpu.h"
    header.write_text(header.read_text().replace("#define SRA_CPU_VERSION 1", "#define SRA_CPU_VERSION 2"))
    with pytest.raises(VersionError, match=r"must have version 1 of sra_cpu\.h, got 2; `sra build-kernels`"):
        CpuLibrary(build_cpu_library(tmp_path / "l.so", sources))


def test_doctor_says_who_reads_query_tiles(tmp_path: Path) -> None:
    with library_at(tmp_path / "none.so"):
        section = doctor.report().partition("  gather_attention, query tiles\n")[2]
        assert section.startswith("    sdpa           yes, auto takes it\n")
        assert (
            "    cpp            no: the library of C++ kernels must be built first, got none; `sra build-k" in section
        )
    with library_at(built()):
        section = doctor.report().partition("  gather_attention, query tiles\n")[2]
        assert section.startswith("    cpp            yes, auto takes it\n")
