"""What the compiler makes of the attention kernels in every shipped configuration, on cards that are not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.ops._tuning import config_for
from sparse_ref_attn.ops.gather_attention.arguments import Arguments
from sparse_ref_attn.ops.gather_attention.triton_forward import launch_forward
from sparse_ref_attn.ops.gather_attention.triton_grad_kv import launch_grad_kv, launch_grad_kv_gathered
from sparse_ref_attn.ops.gather_attention.triton_grad_q import launch_delta, launch_grad_q
from sparse_ref_attn.ops.gather_attention.triton_sum_rows import launch_sum_rows
from sparse_ref_attn.ops.gather_attention.tuning import FORWARD, GRAD_KV, GRAD_Q

from .aot import Launch, compiled_for

#: Registers are 255 at most by construction, and a spill shows on the stack. Bytes of shared memory for one program:
SHARED_AT_MOST = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 942}
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC.*MMA", "gfx942": "v_mfma"}


def arguments(
    channels: int,
    *,
    parts: int = 1,
    dense: bool = True,
    gathered: bool = True,
    row: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Arguments:
    """Meta tensors at FLUX sizes, 24 heads; `row` is the stride between rows where it is not heads x channels."""

    def tensor(rows: int) -> Tensor:
        x = torch.empty(rows, row or 24 * channels, dtype=dtype, device="meta")
        return x[:, : 24 * channels].unflatten(1, (24, channels))

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    k = tensor(4608) if dense else None
    bank = tensor(4096) if gathered else None
    return Arguments(
        tensor(4608), k, k, None, None, bank, bank, integers(parts, 5), integers(parts, 5) if dense else None,
        integers(2048) if gathered else None, integers(1, 5) if gathered else None, channels**-0.5, False,
    )  # fmt: skip


def kernels(
    card: str, channels: int, parts: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Callable[[], object]]:
    """Launches of the four attention kernels in their configuration for a card."""
    a = arguments(channels, parts=parts, dtype=dtype)
    assert a.k is not None
    assert a.cu_seqlens_k is not None
    rows = torch.empty(24, a.q.shape[0], device="meta")
    forward, of_q, of_kv = (config_for(t, CAPABILITY[card], channels) for t in (FORWARD, GRAD_Q, GRAD_KV))
    return {
        "forward": lambda: launch_forward(a, forward),
        "grad_q": lambda: launch_grad_q(a, a.q, rows, rows, of_q),
        "grad_kv dense": lambda: launch_grad_kv(a, a.k, a.k, a.cu_seqlens_k, a.q, rows, rows, of_kv),
        "grad_kv gathered": lambda: launch_grad_kv_gathered(a, a.q, rows, rows, of_kv),
    }


def compiled(card: str, launch: Callable[[], object]) -> Launch:
    with compiled_for(card) as launches:
        launch()
    return launches[-1]


def check(card: str, seen: Launch) -> None:
    assert seen.stack == 0
    assert seen.shared <= SHARED_AT_MOST[card]
    assert seen.count(MATRIX[card]) > 0
    if card.startswith("sm_"):
        assert seen.count(r"LDGSTS.*\.128") > 0
        assert seen.count(r"LDGSTS") - seen.count(r"LDGSTS.*\.128") <= 8  # lse and delta only
        assert seen.count(r"LDG\..*U16") == 0
        assert seen.count("LDGDEPBAR") > 0


@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv dense", "grad_kv gathered"])
@pytest.mark.parametrize("card", ["sm_80", "sm_90"])
def test_head_dim_128_does_not_spill_and_copies_asynchronously(card: str, kernel: str) -> None:
    check(card, compiled(card, kernels(card, 128, parts=1)[kernel]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv dense", "grad_kv gathered"])
@pytest.mark.parametrize("channels", [32, 64, 128])
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_configuration(card: str, channels: int, kernel: str, parts: int, dtype: torch.dtype) -> None:
    check(card, compiled(card, kernels(card, channels, parts, dtype)[kernel]))


@pytest.mark.slow
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_second_dense_tensor_and_a_selection_per_head(card: str) -> None:
    a = arguments(128, parts=2)
    per_head = torch.empty(24, 5, dtype=torch.int32, device="meta")
    a = a._replace(k2=a.k, v2=a.k, ref_offsets=per_head)
    rows = torch.empty(24, a.q.shape[0], device="meta")
    forward, of_q, of_kv = (config_for(t, CAPABILITY[card], 128) for t in (FORWARD, GRAD_Q, GRAD_KV))
    check(card, compiled(card, lambda: launch_forward(a, forward)))
    check(card, compiled(card, lambda: launch_grad_q(a, a.q, rows, rows, of_q)))
    for one in (a, a._replace(distinct=True)):
        check(card, compiled(card, lambda one=one: launch_grad_kv_gathered(one, one.q, rows, rows, of_kv)))


def test_the_gather_is_pipelined_as_deep_as_the_dense_loop() -> None:
    """Read where they are needed, indices halve the pipeline: two buffers, whatever num_stages says."""
    config = config_for(FORWARD, 90, 128)
    dense, gathered = (
        compiled("sm_90", lambda a=a: launch_forward(a, config))
        for a in (arguments(128, gathered=False), arguments(128, dense=False))
    )
    tile = 2 * config.block_n * 128
    queries = 2 * config.block_m * 128
    assert config.stages == 3
    assert dense.shared >= queries + 2 * config.stages * tile
    assert gathered.shared >= queries + 2 * config.stages * tile
    assert gathered.count(r"LDGSTS.*\.128") == dense.count(r"LDGSTS.*\.128")


def test_a_row_stride_that_is_no_multiple_of_16_bytes_would_cost_the_copies() -> None:
    """Why the backend refuses it."""
    config = config_for(FORWARD, 90, 128)
    seen = compiled("sm_90", lambda: launch_forward(arguments(128, row=24 * 128 + 1, dense=False), config))
    assert seen.count(r"LDGSTS.*\.128") == 0
    assert seen.count(r"LDG\..*U16") > 0


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
