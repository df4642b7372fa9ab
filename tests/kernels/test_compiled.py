"""The gate on what nvcc made: no spills, registers and shared memory within bounds, the instructions meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
import torch

from sparse_ref_attn.functional import gather_attention
from sparse_ref_attn.ops.attention_mass.impl.cuda import launch_lse, launch_mass

from ..cuda.emulated import emulated, shipped
from .compiled import Kernel, kernels

ARCHS = ["80", "90a", pytest.param("100a", marks=pytest.mark.slow)]
CHANNELS = [128, pytest.param(64, marks=pytest.mark.slow)]
#: Registers a thread, C = 64 and 128. A multiprocessor has 65,536: 255 leave a block of 8 warps, 168 three of 4.
MOST_REGISTERS = {
    "gather_attention": {64: 255, 128: 255},
    "attention_lse": {64: 168, 128: 168},
    "attention_mass": {64: 168, 128: 255},
}
#: Dynamic shared memory of a block in bytes, C = 64 and 128. A multiprocessor of compute capability 8.0 has 163 KiB.
MOST_SHARED = {
    "gather_attention": {64: 65_536, 128: 98_304},
    "attention_lse": {64: 41_472, 128: 82_432},
    "attention_mass": {64: 41_472, 128: 82_432},
}


@pytest.fixture(scope="module")
def found(built) -> Callable[[str], dict[str, Kernel]]:
    """Every kernel for an architecture, by name."""
    return cache(lambda arch: kernels(built.path(arch), arch))


def chosen(every: dict[str, Kernel], name: str, channels: int) -> dict[str, Kernel]:
    out = {n: k for n, k in every.items() if n.startswith(f"{name}<") and f", {channels}" in n}
    assert {n.partition("<")[2].partition(",")[0] for n in out} == {"float16", "bfloat16"}
    return out


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(found, arch: str) -> None:
    every = found(arch)
    assert len(every) >= 15
    for name, kernel in every.items():
        assert kernel.stack == kernel.local == 0, name
        assert kernel.count("STL|LDL") == 0, name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", MOST_REGISTERS)
def test_registers(found, name: str, channels: int, arch: str) -> None:
    for instance, kernel in chosen(found(arch), name, channels).items():
        assert kernel.registers <= MOST_REGISTERS[name][channels], instance


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", MOST_REGISTERS)
def test_the_instructions_meant(found, name: str, channels: int, arch: str) -> None:
    for instance, kernel in chosen(found(arch), name, channels).items():
        matrix = rf"HMMA\.16816\.F32{re.escape('.BF16') if 'bfloat16' in instance else ''}$"
        assert kernel.count(matrix) == kernel.count("HMMA") > 0, instance  # products in float32, of this dtype alone
        assert kernel.count(r"LDSM\.16\.M.*\.4") > 0, instance
        assert kernel.count(r"LDGSTS.*\.128") > 0, instance
        assert kernel.count(r"LDG\..*U16") == 0, instance
        assert kernel.count(r"MUFU\.EX2") > 0, instance


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_move_16_bytes_at_a_time(found, arch: str) -> None:
    for name, kernel in found(arch).items():
        if name.startswith("copy_rows"):
            assert kernel.count(r"LDG\.E.*\.128") > 0, name
            assert kernel.count(r"STG\.E.*\.128") > 0, name


@pytest.mark.parametrize("arch", ARCHS)
def test_no_atomics(found, arch: str) -> None:
    for name, kernel in found(arch).items():
        assert kernel.count("RED|ATOM") == 0, name


@pytest.mark.parametrize("channels", [64, 128])
def test_shared_memory_of_a_launch(channels: int) -> None:
    """The launchers are the same source under the emulator, which says what they asked for."""
    x = torch.zeros(1, 2, 1, channels, dtype=torch.float16)
    with emulated(shipped()) as library:
        gather_attention(x, x, x, backend="cuda")
        assert 0 < library.count("shared bytes") <= MOST_SHARED["gather_attention"][channels]
        lse = launch_lse(x, x, 1.0, 1)
        assert 0 < library.count("shared bytes") <= MOST_SHARED["attention_lse"][channels]
        launch_mass(x, x, lse, 1.0, 1)
        assert 0 < library.count("shared bytes") <= MOST_SHARED["attention_mass"][channels]
