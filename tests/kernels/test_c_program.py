"""The interface from C: a program without Python refuses what it must, and outlives a machine without a driver."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from sparse_ref_attn.kernels.places import source_directory

PROGRAM = Path(__file__).parent / "program.c"


def run(library: Path, directory: Path, *arguments: str) -> str:
    program = directory / "program"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{source_directory() / 'include'}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run(["gcc", *flags, str(PROGRAM), "-o", str(program), *link], check=True)
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_refusals_and_a_machine_without_a_driver(built, tmp_path: Path) -> None:
    said = run(built.path("80"), tmp_path, *([] if torch.cuda.is_available() else ["without-driver"]))
    assert said.endswith("every refusal as expected\n")
    assert torch.cuda.is_available() or "without a driver: CUDA driver version is insufficient" in said
