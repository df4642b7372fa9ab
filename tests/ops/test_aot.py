"""The compile gate itself: it measures, it specialises as a launch would, and it refuses what the card would."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.aot import SHARED_LIMIT, Launch, compiled_for


@triton.jit
def _scores(Q, K, S, stride, n, N: tl.constexpr, STAGES: tl.constexpr):
    i = tl.arange(0, N)
    q = tl.load(Q + i[:, None] * stride + i[None, :])
    s = tl.zeros([N, N], tl.float32)
    for first in tl.range(0, n, N, num_stages=STAGES):
        k = tl.load(K + (first + i)[:, None] * stride + i[None, :])
        s = tl.dot(q, tl.trans(k), s)
    tl.store(S + i[:, None] * N + i[None, :], s)


def launch(stride: int, N: int = 64, warps: int = 4, stages: int = 3, **options: int) -> None:
    q, s = torch.empty(8192, stride, dtype=torch.bfloat16, device="meta"), torch.empty(N, N, device="meta")
    _scores[(1,)](q, q, s, stride, 8192, N=N, STAGES=stages, num_warps=warps, enable_fp_fusion=True, **options)


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
        launch(stride=128, maxnreg=32)
    assert launches[0].stack > 0


@pytest.mark.parametrize(("fences", "serialized"), [(48, True), (25, True), (24, False), (8, False)])
def test_a_fence_for_every_matrix_instruction_is_a_serialized_pipeline(fences: int, serialized: bool):
    instructions = Counter({"WARPGROUP.ARRIVE": fences, "HGMMA.64x64x16.F32": 32, "HGMMA.64x128x16.F32": 16})
    one = Launch("k", (1, 1, 1), "sm_90", registers=128, stack=0, shared=0, instructions=instructions)
    assert one.serialized() == serialized
    assert not replace(one, instructions=Counter({"HMMA.16816.F32": 8})).serialized()


def test_programs_are_bounded_by_what_runs_out_first():
    one = Launch("k", (1, 1, 1), "sm_90", registers=128, stack=0, shared=0, warps=8)
    assert one.programs() == 2
    assert replace(one, registers=129).programs() == 1  # of 65,536: 257 would need 132 a thread
    assert replace(one, registers=32).programs() == 8
    assert replace(one, registers=32, shared=115_712).programs() == 2
    assert replace(one, registers=32, shared=115_713).programs() == 1
    assert replace(one, registers=32, card="sm_100", columns=256).programs() == 2


@pytest.mark.parametrize(("card", "step"), [("sm_80", "16x8x16"), ("sm_90", "64x64x16"), ("sm_100", "64x64x16")])
def test_the_shape_of_a_matrix_step_is_read(card: str, step: str):
    with compiled_for(card) as launches:
        launch(stride=128)
    assert set(launches[0].steps) == {step}
    assert launches[0].warps == 4


def test_too_much_shared_memory_is_refused():
    with compiled_for("sm_80"), pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        launch(stride=256, N=128, warps=8, stages=8)


@pytest.mark.slow
def test_an_amd_card_is_measured():
    with compiled_for("gfx942") as launches:
        launch(stride=128, stages=2)
    assert launches[0].count("v_mfma") > 0
    assert launches[0].stack == 0
