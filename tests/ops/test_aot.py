"""The compile gate itself: it measures, it specialises as a launch would, and it refuses what the card would."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from .aot import SHARED_LIMIT, compiled_for


@triton.jit
def _scores(Q, K, S, stride, n, N: tl.constexpr, STAGES: tl.constexpr):
    i = tl.arange(0, N)
    q = tl.load(Q + i[:, None] * stride + i[None, :])
    s = tl.zeros([N, N], tl.float32)
    for first in tl.range(0, n, N, num_stages=STAGES):
        k = tl.load(K + (first + i)[:, None] * stride + i[None, :])
        s = tl.dot(q, tl.trans(k), s)
    tl.store(S + i[:, None] * N + i[None, :], s)


def launch(stride: int, N: int = 64, warps: int = 4, stages: int = 3) -> None:
    q, s = torch.empty(8192, stride, dtype=torch.bfloat16, device="meta"), torch.empty(N, N, device="meta")
    _scores[(1,)](q, q, s, stride, 8192, N=N, STAGES=stages, num_warps=warps, enable_fp_fusion=True)


@pytest.mark.parametrize(("card", "matrix"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_matrix_instructions_and_16_byte_copies_are_found(card: str, matrix: str):
    with compiled_for(card) as launches:
        launch(stride=128)
    (seen,) = launches
    assert seen.name == "_scores"
    assert seen.grid == (1, 1, 1)
    assert 0 < seen.registers <= 255
    assert seen.stack == 0
    assert 0 < seen.shared <= SHARED_LIMIT[card]
    assert seen.count(matrix) > 0
    assert seen.count(r"LDGSTS.*\.128") > 0
    assert seen.count(r"LDG\..*U16") == 0


def test_a_stride_that_is_no_multiple_of_16_is_seen_to_cost_the_copies():
    with compiled_for("sm_90") as launches:
        launch(stride=129)
    assert launches[0].count(r"LDGSTS.*\.128") == 0
    assert launches[0].count(r"LDG\..*U16") > 0


def test_spills_are_seen():
    with compiled_for("sm_80") as launches:
        launch(stride=256, N=256, warps=4, stages=1)
    assert launches[0].stack > 0


def test_too_much_shared_memory_is_refused():
    with compiled_for("sm_80"), pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        launch(stride=256, N=256, warps=16, stages=4)


@pytest.mark.slow
def test_an_amd_card_is_measured():
    with compiled_for("gfx942") as launches:
        launch(stride=128, stages=2)
    assert launches[0].count("v_mfma") > 0
    assert launches[0].stack == 0
