"""What the compiler makes of the attention kernels in every shipped configuration, on cards that are not there."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import configurations
from benchmarks.aot import Launch, compiled_for
from benchmarks.configurations import CALLS, KERNELS, arguments, compiled, faults, launches
from sparse_ref_attn.ops.gather_attention.gradients import Wanted
from sparse_ref_attn.ops.gather_attention.impl import triton_backend
from sparse_ref_attn.ops.gather_attention.impl.triton_forward import launch_forward
from sparse_ref_attn.ops.gather_attention.impl.triton_grad_kv import launch_grad_kv_gathered
from sparse_ref_attn.ops.gather_attention.impl.triton_grad_q import launch_delta, launch_grad_q
from sparse_ref_attn.ops.gather_attention.impl.triton_sum_rows import launch_sum_rows
from sparse_ref_attn.ops.gather_attention.impl.tuning import FORWARD, GRAD_KV, GRAD_Q, TILES
from sparse_ref_attn.ops.shared.launch_config import Config, config_for

CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 942}
KERNEL_NAMES = ("forward", "grad_q", "grad_kv dense", "grad_kv gathered", *CALLS)


def shipped(card: str, kernel: str, channels: int) -> Config:
    return config_for(KERNELS[kernel], CAPABILITY[card], channels)


def of_table(card: str, kernel: str, channels: int = 128, **case: object) -> Launch:
    case = {**CALLS.get(kernel, {}), **case}
    return compiled(card, launches(arguments(channels, **case), shipped(card, kernel, channels))[kernel])


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("card", ["sm_80", "sm_90"])
def test_head_dim_128_is_what_the_page_says(card: str, kernel: str) -> None:
    seen = of_table(card, kernel)
    assert not faults(seen, kernel)
    configurations.hold(card, kernel, 128, shipped(card, kernel, 128), seen)


@pytest.mark.parametrize(("kernel", "card"), list(zip(KERNEL_NAMES[1:], itertools.cycle(["sm_80", "sm_90"]))))
def test_a_batch_of_one(kernel: str, card: str) -> None:
    """One range alone: the search for a program's range is then over a single number.

    The forward kernel's is in `test_the_gather_is_pipelined_as_deep_as_the_dense_loop`.
    """
    gathered = card == "sm_90" or kernel.endswith("gathered")
    assert not faults(of_table(card, kernel, items=1, gathered=gathered), kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("channels", [32, 64, 128])
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100"])
def test_every_row_is_what_the_page_says(card: str, channels: int, kernel: str) -> None:
    configurations.hold(card, kernel, channels, shipped(card, kernel, channels), of_table(card, kernel, channels))


def test_a_pipeline_that_ptxas_serializes_is_a_fault() -> None:
    """One program of 4 warps on 128 x 128 scores does not fit its registers: every matrix step waits for the last."""
    seen = compiled("sm_90", launches(arguments(64, gathered=False), Config(128, 128, 4, 2))["forward"])
    assert seen.count("WARPGROUP.ARRIVE") == seen.count("HGMMA") > 0
    assert any(fault.startswith("serialized") for fault in faults(seen))


CASES = {
    "joint": {},
    "joint, batch of one": {"items": 1},
    "two ranges": {"parts": 2},
    "dense alone": {"gathered": False},
    "bank alone": {"dense": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("channels", [32, 64, 128])
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_configuration(card: str, channels: int, kernel: str, case: str, dtype: torch.dtype) -> None:
    a = arguments(channels, dtype=dtype, **CASES[case], **CALLS.get(kernel, {}))
    launch = launches(a, shipped(card, kernel, channels)).get(kernel)
    if launch is not None:
        assert not faults(compiled(card, launch), kernel)


@pytest.mark.slow
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_second_dense_tensor_and_a_selection_per_head(card: str) -> None:
    a = arguments(128, parts=2)
    per_head = torch.empty(24, 5, dtype=torch.int32, device="meta")
    a = a._replace(k2=a.k, v2=a.k, ref_offsets=per_head)
    rows = torch.empty(24, a.q.shape[0], device="meta")
    forward, of_q, of_kv = (config_for(t, CAPABILITY[card], 128) for t in (FORWARD, GRAD_Q, GRAD_KV))
    assert not faults(compiled(card, lambda: launch_forward(a, forward)))
    assert not faults(compiled(card, lambda: launch_grad_q(a, a.q, rows, rows, of_q)))
    for one in (a, a._replace(distinct=True)):
        assert not faults(compiled(card, lambda one=one: launch_grad_kv_gathered(one, one.q, rows, rows, of_kv)))


@pytest.mark.slow
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_with_a_selection_per_head_and_the_float32_that_they_go_on_from(card: str) -> None:
    for kernel, case in CALLS.items():
        per_head = torch.empty(24, case["tiles"] + 1, dtype=torch.int32, device="meta")
        a = arguments(128, **case)._replace(ref_offsets=per_head)
        assert not faults(compiled(card, launches(a, shipped(card, kernel, 128))[kernel]), kernel)
    shared, config = a.shared, shipped(card, "forward", 128)
    assert shared is not None
    assert not faults(compiled(card, lambda: launch_forward(shared, config, torch.float32)))


@pytest.mark.parametrize(
    "table", [FORWARD, GRAD_Q, GRAD_KV, *TILES.values()], ids=["forward", "grad_q", "grad_kv", *CALLS]
)
def test_every_card_has_rows_of_its_own(table: dict[tuple[int, int], Config]) -> None:
    """Blackwell must not take Hopper's: its accumulators lie elsewhere and its matrix steps have 128 rows."""
    assert {(row, channels) for row in (80, 90, 100) for channels in (32, 64, 128)} <= set(table)
    assert config_for(table, 103, 64) is table[100, 64]
    assert config_for(table, 120, 64) is config_for(table, 89, 64) is table[80, 64]


def test_the_gather_is_pipelined_as_deep_as_the_dense_loop() -> None:
    """Read where they are needed, indices halve the pipeline: two buffers, whatever num_stages says."""
    config = config_for(FORWARD, 90, 128)
    dense, gathered = (
        of_table("sm_90", "forward", items=1, **case) for case in (CASES["dense alone"], CASES["bank alone"])
    )  # fmt: skip
    assert not faults(dense)
    assert not faults(gathered)
    tile = 2 * config.block_n * 128
    queries = 2 * config.block_m * 128
    assert config.stages == 3
    assert dense.shared >= queries + 2 * config.stages * tile
    assert gathered.shared >= queries + 2 * config.stages * tile
    assert gathered.count(r"LDGSTS.*\.128") == dense.count(r"LDGSTS.*\.128")


@pytest.mark.parametrize("more", [1, 8])
def test_a_row_stride_that_is_no_multiple_of_16_elements_would_cost_the_copies(more: int) -> None:
    """Why the backend refuses it, eight elements (16 bytes) included."""
    seen = of_table("sm_90", "forward", 32, row=24 * 32 + more, dense=False)
    assert seen.count(r"LDGSTS.*\.128") == 0
    assert seen.count(r"LDG\..*U16") > 0
    assert "loads of 2 bytes" in faults(seen)


def test_a_gradient_whose_rows_lie_eight_elements_off_is_copied_first() -> None:
    """A row stride of 8 mod 16 elements is aligned to 16 bytes, but Triton does not see it."""
    a = arguments(128)
    grad_out = torch.empty(a.q.shape[0], 24 * 128 + 8, dtype=torch.bfloat16, device="meta")
    grad_out = grad_out[:, : 24 * 128].unflatten(1, (24, 128))
    rows = torch.empty(24, a.q.shape[0], device="meta")
    configs = shipped("sm_90", "grad_q", 128), shipped("sm_90", "grad_kv dense", 128)
    with compiled_for("sm_90") as seen:
        triton_backend.backward(a, grad_out, None, a.q, rows, Wanted(True, False, False), configs)
    assert [one.name for one in seen] == ["_delta", "_grad_q"]
    assert all(one.count(r"LDG\..*U16") == 0 for one in seen)
    assert not faults(seen[1])


@pytest.mark.parametrize("card", ["sm_80", "sm_90"])
def test_row_sums_do_not_spill_and_load_whole_words(card: str) -> None:
    out = torch.empty(4608, 24, 128, dtype=torch.bfloat16, device="meta")
    packed, rows = torch.empty(2048, 3072, device="meta"), torch.empty(2048, dtype=torch.int64, device="meta")
    for launch in (
        lambda: launch_delta(out, out, None),
        lambda: launch_sum_rows(packed, packed, rows, 4096, torch.bfloat16),
    ):
        seen = compiled(card, launch)
        assert seen.stack == 0
        assert seen.count(r"LDG\..*U16") == 0
        assert seen.count(r"LDG\..*128") > 0
