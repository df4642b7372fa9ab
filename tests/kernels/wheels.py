"""Wheels of a copy of the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from sparse_ref_attn.kernels.places import installed_sources, source_directory
from tests.builds import made

__all__ = ["ARCHS", "WHOLE", "build_wheel", "carried", "library_of", "members", "whole_wheel"]

ROOT = Path(__file__).resolve().parents[2]
SAID = "said.txt"
WHOLE = "wheel"
"""What `made` calls the wheel with both libraries."""
ARCHS = ("80", "90a")


def build_wheel(home: Path, **variables: str) -> tuple[Path, str]:
    """The wheel of a copy of the tree, and what was printed."""
    tree = home / "tree"
    tree.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    for name in ("sparse_ref_attn", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "emulator"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(home),
        str(tree),
    ]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = home.glob("*.whl")
    return wheel, done.stdout + done.stderr


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def carried() -> set[str]:
    csrc = source_directory()
    return {f"sparse_ref_attn/csrc/{path.relative_to(csrc)}" for path in installed_sources(csrc)}


def whole_wheel() -> tuple[Path, str]:
    """One with both libraries, for `ARCHS`, and what was printed; built once for all tests."""

    def build(folder: Path) -> None:
        _, said = build_wheel(folder, SRA_CUDA_ARCHS=";".join(ARCHS))
        (folder / SAID).write_text(said)
        shutil.rmtree(folder / "tree")

    folder = made(WHOLE, build)
    (wheel,) = folder.glob("*.whl")
    return wheel, (folder / SAID).read_text()


def library_of(name: str, folder: Path) -> None:
    """Put that library of the whole wheel into `folder`."""
    with zipfile.ZipFile(whole_wheel()[0]) as archive:
        (folder / name).write_bytes(archive.read(f"sparse_ref_attn/lib/{name}"))
