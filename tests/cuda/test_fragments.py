"""Who holds what in mma.sync and ldmatrix: the emulator's tables against CuTe's traits, element by element.

The kernels and the emulator could share one mistake about a fragment; CuTe's layouts, which ship with CUTLASS and drive
its kernels on every card, were written by others.
"""

from __future__ import annotations

import subprocess
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from .emulated import CSRC

HERE = Path(__file__).parent


def tables(program: Path, folder: Path, *includes: Path) -> set[str]:
    target = folder / program.stem
    flags = [flag for path in includes for flag in ("-I", str(path))]
    done = subprocess.run(
        ["g++", "-std=c++17", "-O0", "-w", *flags, program, "-o", target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:4000]
    return set(subprocess.run([target], capture_output=True, text=True, check=True).stdout.splitlines())


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """From the headers in three wheels of the extra `test`: CUTLASS, libcu++, and Triton's copy of CUDA's."""
    cutlass = Path(find_spec("cutlass_library").origin).parent / "source" / "include"
    site = Path(str(distribution("nvidia-cuda-cccl").locate_file("")))
    (std,) = site.glob("nvidia/*/include/**/cuda/std/utility")
    triton = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    folder = tmp_path_factory.mktemp("cute")
    return tables(HERE / "cute_layouts.cpp", folder, cutlass, std.parents[2], triton)


def test_every_element_lies_where_cute_says(cute: set[str], tmp_path: Path) -> None:
    ours = tables(HERE / "our_layouts.cpp", tmp_path, CSRC / "emulator")
    elements = 2 * (16 * 16 + 16 * 8 + 16 * 8) + 2 * 4 * 8 * 8
    assert len(cute) == len(ours) == elements
    assert ours == cute


@pytest.mark.parametrize(
    ("old", "new", "differ"),
    [
        ("reg % 2), 2 * (lane % 4) + half + 8 * (reg / 2)", "reg / 2), 2 * (lane % 4) + half + 8 * (reg % 2)", "A"),
        ("half + 8 * reg, lane / 4", "half + 8 * (1 - reg), lane / 4", "B"),
        ("reg / 2), 2 * (lane % 4) + reg % 2}", "reg % 2), 2 * (lane % 4) + reg / 2}", "C"),
        ("Place{at, group} : Place{group, at}", "Place{group, at} : Place{at, group}", "ldmatrix"),
    ],
)  # fmt: skip
def test_a_swapped_index_is_seen(cute: set[str], tmp_path: Path, old: str, new: str, differ: str) -> None:
    text = (CSRC / "emulator" / "fragments.h").read_text()
    assert text.count(old) == 1
    (tmp_path / "fragments.h").write_text(text.replace(old, new))
    wrong = tables(HERE / "our_layouts.cpp", tmp_path, tmp_path) - cute
    assert {line.split()[0].split(".")[0] for line in wrong} == {differ}
