"""The build by itself: what changed is compiled, two processes do not meet, and a failure leaves what was there."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton

from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import BuildError
from sparse_ref_attn.kernels import build, places
from sparse_ref_attn.kernels.abi import FUNCTIONS
from sparse_ref_attn.kernels.build import build_kernels, build_library
from sparse_ref_attn.kernels.library import Library

from . import stand_in

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package believes that these are its sources; the cache is empty."""
    directory = stand_in.write(tmp_path / "csrc")
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SRA_CUDA_ARCHS", "80")
    places.content_key.cache_clear()
    yield directory
    places.content_key.cache_clear()


def test_the_library_says_what_it_was_built_for(small: Path) -> None:
    library = Library(small)
    assert library.archs == ("80",)
    assert library.built_by.startswith("nvcc ")


def test_the_library_shows_its_functions_and_nothing_else(small: Path) -> None:
    shown = subprocess.run(["nm", "-D", "--defined-only", small], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in shown.splitlines()}
    assert names == {"sra_build", *FUNCTIONS}
    needed = subprocess.run(["readelf", "-d", small], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed
    assert "libcuda" not in needed  # neither the driver nor the runtime


def test_only_what_changed_is_compiled_and_ptx_for_later_cards_is_put_in(
    nvcc: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sources = stand_in.write(tmp_path / "a path with spaces & more" / "csrc")
    target, work = tmp_path / "out" / "l.so", tmp_path / "work here"

    def said() -> str:
        build_library(target, work, ["80"], sources, verbose=True)
        return capsys.readouterr().out

    assert "nvcc" in said()
    assert "no work to do" in said()
    time.sleep(0.01)
    with (sources / "include" / "sra.h").open("a") as header:
        header.write("\n#define SRA_TOUCHED 1\n")
    again = said()
    assert "stand_in.cu" in again
    assert "build_stamp.cpp" not in again
    build_library(target, work, ["80+PTX", "90a"], sources)
    assert Library(target).archs == ("80+PTX", "90a")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for option, cards in (("--list-ptx", {"sm_80"}), ("--list-elf", {"sm_80", "sm_90a"})):
        told = subprocess.run([tool, option, target], capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r"\.(sm_\w+)\.", told)) == cards


def test_a_failed_build_says_why_and_leaves_what_was_there(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "l.so"
    shutil.copyfile(small, target)
    sources = stand_in.write(tmp_path / "csrc", stand_in.TEXT + "int broken = this_is_no_name;\n")
    with pytest.raises(
        BuildError, match=r"must succeed, got exit code \d:\nFAILED: .*stand_in\.o(.|\n)*this_is_no_name"
    ):
        build_library(target, tmp_path / "work", ["80"], sources)
    assert target.read_bytes() == small.read_bytes()
    assert [path.name for path in tmp_path.glob(".l.so*")] == []


def test_sources_that_are_not_there(tmp_path: Path, nvcc: str) -> None:
    with pytest.raises(BuildError, match=r"sources of the kernels must lie in .*, got no \.cu file there"):
        build_library(tmp_path / "l.so", tmp_path / "work", ["80"], tmp_path)


def test_the_cache_is_by_content(sources: Path) -> None:
    first = places.cached_library()
    assert first.parents[3].name == "cache"
    (sources / "more.cuh").write_text("// another source\n")
    places.content_key.cache_clear()
    assert places.cached_library() != first


def test_first_use_is_explicit_and_a_build_ends_with_one_rename(
    sources: Path, nvcc: str, capsys: pytest.CaptureFixture
) -> None:
    assert not places.cached_library().exists()
    assert main(["build-kernels"]) == 0
    said = capsys.readouterr().out
    assert f"Built {places.cached_library()}" in said
    assert Library(places.cached_library()).archs == ("80",)
    assert main(["build-kernels", "--archs", "9.0"]) == 2
    assert "sra: error: an architecture must be digits" in capsys.readouterr().err
    path = places.cached_library()
    loaded = ctypes.CDLL(str(path))
    inode = path.stat().st_ino
    assert build_kernels() == path
    assert path.stat().st_ino != inode  # whoever loaded the first keeps it
    assert loaded.sra_version() == 1


def test_two_processes_at_once(tmp_path: Path, nvcc: str) -> None:
    """Both return with the whole library, and it was compiled once."""
    sources = stand_in.write(tmp_path / "csrc")
    log = tmp_path / "log"
    slow = tmp_path / "bin" / "nvcc"  # the real one, but it says when it starts and ends to compile
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\necho start "$@" >> {log}\n"{nvcc}" "$@" || exit 1\necho end >> {log}\n')
    slow.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from sparse_ref_attn.kernels.build import build_library\n"
        "build_library(*map(Path, sys.argv[1:3]), ['80'], Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "l.so"), str(tmp_path / "work"), str(sources)]
    environment = {**os.environ, "CUDA_HOME": str(tmp_path / "none"), "PATH": f"{slow.parent}:{os.environ['PATH']}"}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    compiled = [line for line in log.read_text().splitlines() if "start" in line and "stand_in.cu" in line]
    assert len(compiled) == 1
    assert Library(tmp_path / "l.so").archs == ("80",)


def test_the_lock_is_held_while_ninja_runs(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"

    def check(ninja: str, directory: Path, verbose: bool) -> None:
        with (directory / "lock").open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.copyfile(small, directory / places.LIBRARY)

    monkeypatch.setattr(build, "_run_ninja", check)
    build_library(tmp_path / "l.so", work, ["80"], stand_in.write(tmp_path / "csrc"))
