"""What the compiler makes of the mass, LSE and row kernels."""

from __future__ import annotations

import pytest
import torch

from benchmarks.aot import Launch, compiled_for
from benchmarks.configurations import KERNELS, arguments, compiled, faults, hold
from benchmarks.configurations import launches as of
from sparse_ref_attn.ops.attention_mass.impl.triton_mass import launch_lse, launch_mass
from sparse_ref_attn.ops.attention_mass.impl.triton_tile_mass import launch_parts, launch_tile_mass
from sparse_ref_attn.ops.attention_mass.impl.tuning import LSE, MASS, TILE_MASS
from sparse_ref_attn.ops.attention_mass.ragged import Ragged
from sparse_ref_attn.ops.pack_rows.impl.triton_rows import launch_pack, launch_unpack
from sparse_ref_attn.ops.shared.launch_config import Table, config_for

CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 942}
EVERY_TIME = ["sm_80", "sm_90"]
AT_LENGTH = [pytest.param(card, marks=pytest.mark.slow) for card in ("sm_80", "sm_90", "sm_100", "gfx942")]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(card: str, C: int, dtype: torch.dtype, masked: bool, ragged: bool) -> list[Launch]:
    """The LSE's and the mass's launch at the size of FLUX.1 Kontext: 4096 generation and 4096 reference tokens."""
    text, rows = 512, 512 + 4096 + 4096
    joint = meta(1, rows, 24, C, dtype=dtype)
    q, k_ref = joint[:, text : text + 4096], joint[:, text + 4096 :]
    mask = meta(1, rows, dtype=torch.bool) if masked else None
    cu, first = meta(5, dtype=torch.int32), meta(4, dtype=torch.int32)
    items = Ragged(cu, cu, cu, first, 1024, 1024) if ragged else None
    capability = CAPABILITY[card]
    with compiled_for(card) as seen:
        lse = launch_lse(q, joint, 0.1, 1, config_for(LSE, capability, C), mask, items)
        ref_mask = None if mask is None else mask[:, text + 4096 :]
        launch_mass(q, k_ref, lse, 0.1, 1, config_for(MASS, capability, C), ref_mask, items)
    assert [one.name for one in seen] == ["_lse", "_mass"]
    return seen


def gate(one: Launch, masked: bool = False) -> None:
    found = faults(one)
    # two bytes of the key mask at a time; keys or queries in such steps would take 64 of them at head dim 128
    if masked and one.count(r"LDG\..*U16") <= 16:
        found = [fault for fault in found if fault != "loads of 2 bytes"]
    assert not found, one


@pytest.mark.parametrize("card", EVERY_TIME)
def test_mass_and_lse(card: str):
    for one in launches(card, 128, torch.bfloat16, masked=False, ragged=False):
        gate(one)


@pytest.mark.parametrize("table", [LSE, MASS, TILE_MASS], ids=["lse", "mass", "mass per tile"])
def test_every_card_has_rows_of_its_own(table: Table):
    assert {(row, channels) for row in (80, 90, 100) for channels in (32, 64, 128)} <= set(table)


@pytest.mark.parametrize("kernel", ["lse", "mass", "mass per tile"])
@pytest.mark.parametrize("C", [128, *(pytest.param(C, marks=pytest.mark.slow) for C in (64, 32))])
@pytest.mark.parametrize("card", [*EVERY_TIME, AT_LENGTH[2]])
def test_rows_are_what_the_page_says(card: str, C: int, kernel: str):
    config = config_for(KERNELS[kernel], CAPABILITY[card], C)
    hold(card, kernel, C, config, compiled(card, of(arguments(C), config)[kernel]))


@pytest.mark.parametrize(("masked", "ragged"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [32, 64, 128])
@pytest.mark.parametrize("card", AT_LENGTH)
def test_every_mass_and_lse(card: str, C: int, dtype: torch.dtype, masked: bool, ragged: bool):
    for one in launches(card, C, dtype, masked, ragged):
        gate(one, masked)


@pytest.mark.parametrize("card", EVERY_TIME)
def test_the_mass_per_tile_is_two_kernels_and_needs_no_atomics(card: str):
    q, lse = meta(2, 4096, 24, 128), meta(2, 24, 4096, dtype=torch.float32)
    mask, tiles = meta(2, 4096, dtype=torch.bool), meta(257, dtype=torch.int32)
    config = config_for(TILE_MASS, CAPABILITY[card], 128)
    with compiled_for(card) as seen:
        launch_tile_mass(q, q, lse, tiles, 0.1, True, config, mask)
    parts, means = seen
    gate(parts)
    assert (parts.name, parts.grid) == ("_parts", (32, 32, 2))
    assert (means.name, means.grid, means.stack) == ("_means", (256, 4, 2), 0)
    assert not any(one.count(r"(RED|ATOM\w*)(\.|$)") for one in seen)


@pytest.mark.parametrize("reduce_heads", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [32, 64, 128])
@pytest.mark.parametrize("card", AT_LENGTH)
def test_every_mass_per_tile(card: str, C: int, dtype: torch.dtype, reduce_heads: bool):
    joint = meta(1, 512 + 8192, 24, C, dtype=dtype)
    lse = meta(1, 24, 4096, dtype=torch.float32)
    for integer in (torch.int32, torch.int64):
        tiles, config = meta(257, dtype=integer), config_for(TILE_MASS, CAPABILITY[card], C)
        with compiled_for(card) as seen:
            launch_parts(joint[:, 512:4608], joint[:, 4608:], lse, tiles, 0.1, reduce_heads, config)
        gate(seen[0])


@pytest.mark.parametrize("card", [*EVERY_TIME, *AT_LENGTH[2:]])
def test_rows_move_in_16_bytes(card: str):
    tokens = [meta(1, 8192, 3072), meta(1, 8192, 128)]
    row = meta(2048, dtype=torch.int64)
    with compiled_for(card) as seen:
        launch_unpack(launch_pack(tokens, row, 1), row, 8192, 1)
    assert [one.grid for one in seen] == [(512, 2, 1), (512, 2, 1)]
    for one in seen:
        assert one.stack == 0, one
        if card == "gfx942":
            assert one.count("(global|buffer)_store_dwordx4") > 0, one.instructions
        else:
            assert one.count(r"LDG\.E.*128") > 0, one.instructions
            assert one.count(r"STG\.E.*128") > 0, one.instructions
            assert one.count(r"(LDG|STG)\..*U16") == 0, one.instructions
