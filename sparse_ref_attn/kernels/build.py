"""Compiles the sources into one shared library, with ninja; only where somebody asks for it.

`pip install` builds into the package, `build_kernels` into the user's cache. Both write the same ninja file.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import BuildError
from .library import library
from .places import LIBRARY, cached_library, source_directory, source_files
from .toolchain import PTX, Toolchain, find_toolchain

__all__ = ["build_kernels", "build_library", "ninja_file"]

FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall")
# A library that needs no libcudart, and shows nothing of the one inside it: it loads on a machine without a driver.
LINK_FLAGS = ("-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "-Xlinker", "--no-undefined")
# What `Library` reads to know which cards it serves.
STAMP = 'extern "C" __attribute__((visibility("default"))) const char* const sra_build = SRA_BUILD;\n'


def ninja_file(tools: Toolchain, archs: Sequence[str], sources: Path) -> str:
    """The text of build.ninja: one object for each source file, holding code for every architecture.

    nvcc's version stands among the flags, so that another nvcc in the same place compiles everything again.
    """
    targets = " ".join(f"-gencode arch=compute_{a.removesuffix(PTX)},code={code}" for a in archs for code in _code(a))
    stamp = f'-DSRA_BUILD="{" ".join(archs)}, nvcc {tools.version}"'
    flags = [*FLAGS, f"-I{sources}/include", stamp, "--threads", str(len(archs))]
    lines = [
        "ninja_required_version = 1.8",
        f"nvcc = {_command(tools.nvcc)}",
        f"flags = {_command(*flags)}",
        f"targets = {targets}",
        "",
        "rule compile",
        "  command = $nvcc $flags $targets -c $in -o $out -MD -MF $out.d",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f"  command = $nvcc {_command(*LINK_FLAGS)} $targets $in -o $out",
        "  description = link $out",
        "",
    ]
    inputs = {f"{path.stem}.o": _path(path) for path in source_files(sources)} | {"build_stamp.o": "build_stamp.cpp"}
    lines += [f"build {name}: compile {path}" for name, path in inputs.items()]
    lines += [f"build {LIBRARY}: link {' '.join(inputs)}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


def _code(arch: str) -> list[str]:
    """What nvcc makes for an architecture: machine code, and PTX where it is asked for."""
    digits = arch.removesuffix(PTX)
    return [f"sm_{digits}", f"compute_{digits}"][: 1 + arch.endswith(PTX)]


def build_library(
    target: Path, work: Path, archs: Sequence[str] | None = None, sources: Path | None = None, verbose: bool = False
) -> Path:
    """Compile what changed since the last build in `work`, and put the library at `target` in one step.

    Parameters
    ----------
    target : Path
        File to write; a process that has loaded an earlier one keeps what it has.
    work : Path
        Directory of build.ninja and the objects. One process at a time: others wait.
    archs : sequence of str, optional
        Such as ``("80", "90a")``. Default those of SRA_CUDA_ARCHS, else 80, 90a and 100a as far as nvcc knows them.
    sources : Path, optional
        Default `source_directory()`.
    verbose : bool
        Print what ninja does, as it does it. Default False.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    BuildError
        If nvcc or ninja is missing, nvcc does not know an architecture, there are no sources, or a command fails.
    """
    tools = find_toolchain()
    sources = source_directory() if sources is None else sources
    if not source_files(sources):
        raise BuildError(f"the sources of the kernels must lie in {sources}, got no .cu file there")
    work.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(work / "lock"):
        _write_if_changed(work / "build_stamp.cpp", STAMP)
        _write_if_changed(work / "build.ninja", ninja_file(tools, tools.archs(archs), sources))
        _run_ninja(tools.ninja, work, verbose)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(work / LIBRARY, unfinished)
        os.replace(unfinished, target)
    return target


def build_kernels(archs: Sequence[str] | None = None, *, verbose: bool = False) -> Path:
    """Build the library of these very sources into the user's cache, where every later process finds it.

    Nothing calls this by itself: a kernel is never compiled because it was used.

    Parameters
    ----------
    archs, verbose
        As in `build_library`.

    Returns
    -------
    Path
        The library, ``~/.cache/sparse_ref_attn/kernels/KEY/libsra_kernels.so`` (XDG_CACHE_HOME counts), with KEY from
        the content of the sources.

    Raises
    ------
    BuildError
        As `build_library`.
    """
    target = cached_library()
    built = build_library(target, target.parent / "ninja", archs, verbose=verbose)
    library.forget()
    return built


def _run_ninja(ninja: str, work: Path, verbose: bool) -> None:
    jobs = os.environ.get("MAX_JOBS")
    command = [ninja, "-C", str(work), *(["-j", jobs] if jobs else [])]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if verbose:
                print(line, end="", flush=True)
    if process.returncode:
        raise BuildError(f"{shlex.join(command)} must succeed, got exit code {process.returncode}:\n{_cause(said)}")


def _cause(lines: Sequence[str], most: int = 20) -> str:
    """The first edge that failed: what was wrong, without what came after it."""
    first = next((i for i, line in enumerate(lines) if line.startswith("FAILED:")), 0)
    return "".join(lines[first : first + most]).rstrip()


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock; it ends with the process, however that ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _command(*words: str) -> str:
    """Words of a shell command, inside a ninja file."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    """A path in a build line of a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
