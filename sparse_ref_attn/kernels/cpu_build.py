"""Compiles csrc/cpu into one shared library, by the machine's C++ compiler; only where somebody asks for it.

The kernels are compiled once for each target that a processor of this kind may be, and the library asks the processor
when it runs: so a library that is built on one machine runs on every other of its kind, as a wheel must.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..errors import BuildError
from .cpu_abi import TARGETS
from .cpu_library import library
from .places import CPU_LIBRARY, cached_library, cpu_source_files, source_directory

__all__ = ["COMPILERS", "build_cpu_kernels", "build_cpu_library", "find_compiler"]

COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
PER_TARGET = "attend.cpp"  # the file that is compiled for each target
X86 = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}


def find_compiler() -> list[str]:
    """The command of a C++ compiler that knows OpenMP: CXX, g++, clang++ or c++.

    Raises
    ------
    BuildError
        If there is none.
    """
    asked = os.environ.get("CXX")
    names = [asked] if asked else COMPILERS
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            trial = [*command, "-std=c++17", "-fopenmp", "-x", "c++", "-", "-o", f"{folder}/trial"]
            if subprocess.run(trial, input=program, text=True, capture_output=True, check=False).returncode == 0:
                return command
    raise BuildError(
        f"a C++17 compiler with OpenMP must be on PATH ({', '.join(COMPILERS)}) or named by CXX, "
        f"got {f'CXX={asked}' if asked else 'none'}"
    )


def build_cpu_library(target: Path, sources: Path | None = None, verbose: bool = False) -> Path:
    """Compile the kernels for every target of this kind of processor, and put the library at `target` in one step.

    Parameters
    ----------
    target : Path
        File to write; a process that has loaded an earlier one keeps what it has.
    sources : Path, optional
        Default `source_directory()`.
    verbose : bool
        Print the commands. Default False.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    BuildError
        If there is no compiler, there are no sources, or a command fails.
    """
    sources = source_directory() if sources is None else sources
    files = cpu_source_files(sources)
    if not files:
        raise BuildError(f"the sources of the C++ kernels must lie in {sources / 'cpu'}, got no .cpp file there")
    compiler = find_compiler()
    targets = X86 if platform.machine() in ("x86_64", "AMD64") else {TARGETS[0]: ()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".cpu-") as folder:
        objects = []
        for path in files:
            for name, flags in targets.items() if path.name == PER_TARGET else (("", ()),):
                objects.append(f"{folder}/{path.stem}{name}.o")
                defined = [f"-DSRA_TARGET={name}"] * bool(name)
                _run([*compiler, *FLAGS, *flags, *defined, "-c", str(path), "-o", objects[-1]], verbose)
        _run([*compiler, *FLAGS, "-shared", *objects, "-o", f"{folder}/{CPU_LIBRARY}"], verbose)
        os.replace(f"{folder}/{CPU_LIBRARY}", target)
    return target


def build_cpu_kernels(*, verbose: bool = False) -> Path:
    """Build the library of these very sources into the user's cache, where every later process finds it.

    Nothing calls this by itself: a kernel is never compiled because it was used.

    Parameters
    ----------
    verbose
        As in `build_cpu_library`.

    Returns
    -------
    Path
        The library, ``~/.cache/sparse_ref_attn/kernels/KEY/libsra_cpu.so`` (XDG_CACHE_HOME counts), with KEY from the
        content of the sources.

    Raises
    ------
    BuildError
        As `build_cpu_library`.
    """
    built = build_cpu_library(cached_library(CPU_LIBRARY), verbose=verbose)
    library.forget()
    return built


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[:20])
        raise BuildError(f"{shlex.join(command)} must succeed, got exit code {done.returncode}:\n{said}")
