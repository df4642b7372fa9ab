"""Bugs planted in the shipped sources, one a time: each is caught, and for what it is.

A bug is a patch to a file of csrc as it stands; the patched kernel is compiled with the emulator and run on a small
problem. The same problem passes on the unpatched kernel (the other files of this directory).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from sparse_ref_attn.errors import KernelError
from sparse_ref_attn.ops.attention_mass.impl.cuda import launch_lse, launch_mass
from sparse_ref_attn.ops.gather_attention.impl.cuda import forward
from sparse_ref_attn.ops.pack_rows.impl.cuda import launch_pack

from ..builds import made
from ..ops.problems import make
from ..pairwise import pairwise
from . import test_attention_mass, test_gather_attention
from .emulated import CSRC, EARLY, LATE, Emulated, compile_kernels, compile_object, emulated

PROBLEM = make(((70, 131),), ((200, 65),), (140, 77), 200, heads=1, channels=64).to(torch.float16)


def attention() -> None:
    """The problem in memory that ends with the tensors, against the truth."""
    test_gather_attention.compare(PROBLEM, *forward(test_gather_attention.arguments(PROBLEM)))


def mass() -> None:
    q, k = test_attention_mass.draw(200, 150)
    launch_mass(q, k, launch_lse(q, k, 0.125, 1), 0.125, 1)


def rows() -> None:
    launch_pack([torch.arange(40.0).view(1, 5, 8)], torch.tensor([4, 5]), 1)


@dataclass(frozen=True)
class Bug:
    """`old` stands once in `file`; with `new` in its place `kernel` fails to run `problem` with `diagnosis`."""

    file: str
    old: str
    new: str
    diagnosis: str
    kernel: str = "gather_attention.cu"
    problem: Callable[[], None] = attention


MASS_LOOP = """\
    const int free = here == 0 ? STAGES - 1 : here - 1;  // every warp has left the tile before
    copy_tile<C>(q_tiles"""
TWO_BARRIERS = """\
    if (warp_id() == 0)
      __syncthreads();
    else
      __syncthreads();
"""
BUGS = {
    "a missing barrier": Bug("gather_attention.cu", "    __syncthreads();\n", "", r"race: .* with no barrier between"),
    "a missing barrier around the pivots": Bug(
        "attention_mass.cu",
        "    __syncthreads();\n" + MASS_LOOP,
        MASS_LOOP,
        r"race: .* with no barrier between",
        "attention_mass.cu",
        mass,
    ),
    "a wait one group too weak": Bug(
        "gather_attention.cu",
        "cp_async_wait<STAGES<C> - 2>()",
        "cp_async_wait<STAGES<C> - 1>()",
        r"reads shared memory at byte \d+ while an asynchronous copy .* is in flight",
    ),
    "a wait without a group": Bug(
        "gather_attention.cu", "    cp_async_commit();\n    return live;", "    return live;", "in flight|nobody wrote"
    ),
    "swapped fragments of v": Bug(
        "gather_attention.cu", "p[strip], v[0], v[1]);", "p[strip], v[1], v[0]);", r"out: error .*, plain PyTorch's"
    ),
    "swapped fragments of k": Bug(
        "tiles.cuh", "a[strip], b[0], b[2]);", "a[strip], b[0], b[1]);", r"out: error .*, plain PyTorch's"
    ),
    "a swapped row of the weights": Bug(
        "gather_attention.cu",
        "s[strip][2 * key + i / 2]",
        "s[strip][2 * key + i % 2]",
        r"out: error .*, plain PyTorch's",
    ),
    "a misaligned copy": Bug(
        "tiles.cuh",
        "x_row + chunk * 8, live)",
        "x_row + chunk * 8 + 4, live)",
        r"misaligned asynchronous copy: .* got one of 8",
    ),
    "a misaligned tile": Bug(
        "gather_attention.cu",
        "k_tiles = q_tile + BLOCK_M * C * 2,",
        "k_tiles = q_tile + BLOCK_M * C * 2 + 8,",
        r"misaligned shared memory access",
    ),
    "a tile past the end of shared memory": Bug(
        "gather_attention.cu",
        "BLOCK_M * C * 2 + 2 * STAGES<C> * TILE_BYTES<C>;",
        "BLOCK_M * C * 2 + STAGES<C> * TILE_BYTES<C>;",
        r"shared memory access out of bounds",
    ),
    "a key row past the end": Bug(
        "gather_attention.cu", "if (key < count) row", "if (key <= count) row", r"global memory access out of bounds"
    ),
    "a query row past the end": Bug(
        "gather_attention.cu", "query < queries.stop ? query : -1", "query", r"global memory access out of bounds"
    ),
    "a result past the end": Bug(
        "gather_attention.cu",
        "      if (row >= queries.stop) continue;\n",
        "",
        r"global memory access out of bounds|race: global memory .* another thread wrote it",
    ),
    "a write into an operand": Bug(
        "gather_attention.cu",
        "uint16_t* out = a.out +",
        "uint16_t* out = const_cast<uint16_t*>(a.q.x) +",
        r"announced to be read only",
    ),
    "dead rows left as they are": Bug(
        "tiles.cuh",
        "    cp_async_16(tile",
        "    if (live) cp_async_16(tile",
        r"reads shared memory at byte \d+ that nobody wrote",
    ),
    "a divergent collective": Bug(
        "tiles.cuh",
        "  x += shfl_xor(x, 1);\n",
        "  if (lane_id() < 16) x += shfl_xor(x, 1);\n",
        r"divergent warp collective",
    ),
    "half a warp at a barrier": Bug(
        "gather_attention.cu",
        "    __syncthreads();\n",
        "    if (lane_id() < 16) __syncthreads();\n",
        r"divergent warp collective: .* is waited for by lanes 0xffff0000 .*, others wait at __syncthreads",
    ),
    "two barriers for one": Bug("gather_attention.cu", "    __syncthreads();\n", TWO_BARRIERS, r"divergent barrier"),
    "a row outside the tensor": Bug(
        "rows.cu",
        "0 <= r && r < all.size",
        "0 <= r && r <= all.size",
        r"global memory access out of bounds",
        "rows.cu",
        rows,
    ),
    "two threads on one row": Bug(
        "rows.cu",
        "side_by_side + threadIdx.x / c.lanes",
        "side_by_side + threadIdx.x / (2 * c.lanes)",
        r"race: global memory at .* another thread wrote it",
        "rows.cu",
        rows,
    ),
}


def plant(bug: Bug, folder: Path) -> Path:
    """csrc with the bug in it, compiled as far as the bug reaches; quickly, not for speed."""
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    text = (sources / bug.file).read_text()
    assert text.count(bug.old) == 1, f"{bug.file} must hold {bug.old!r} once, got {text.count(bug.old)}"
    (sources / bug.file).write_text(text.replace(bug.old, bug.new))
    return compile_kernels(folder, [compile_object(CSRC / "errors.cu"), sources / bug.kernel], "-O0")


@cache
def planted(name: str) -> Emulated:
    return Emulated(made(name, lambda folder: plant(BUGS[name], folder)) / "kernels.so")


@pairwise(name=list(BUGS), seed=[1, 2], copies=[EARLY, LATE])
def test_is_caught_under_every_schedule(name: str, seed: int, copies: int) -> None:
    bug = BUGS[name]
    with emulated(planted(name), seed, copies), pytest.raises((KernelError, AssertionError)) as caught:
        bug.problem()
    assert re.search(bug.diagnosis, str(caught.value)), str(caught.value)


def test_rows_without_a_swizzle_collide_in_the_banks(tmp_path: Path) -> None:
    bug = Bug("tiles.cuh", "(chunk ^ row % 8)", "chunk", "")
    library = Emulated(plant(bug, tmp_path))
    with emulated(library):
        attention()  # right, and slow on a card
    assert library.count("bank conflict") > 0
