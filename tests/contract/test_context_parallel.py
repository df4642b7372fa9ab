"""Dropping at the input under diffusers' context parallelism: two processes make the image of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.errors import IncompatibleError
from tests.contract.two_processes import check
from tests.pipelines import CASES

EXACT = 1e-5  # of an image in [0, 1]: the order of sums


def ranks() -> None:
    """What each of two gloo processes sees."""
    from diffusers import ContextParallelConfig

    config = sra.SparseRef("grid", 0.25, multiple=2)  # the processes have equal parts of the joint rows
    for name in ("kontext", "klein"):
        case = CASES[name]
        pipe = case.build()
        dense = case.call(pipe, steps=2)
        with sra.patched(pipe, config):
            sparse = case.call(pipe, steps=2)
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        with sra.patched(pipe, config) as handle:
            np.testing.assert_allclose(case.call(pipe, steps=2), sparse, atol=EXACT)
            assert [step.kept for step in handle.record.steps] == [24, 24]
        with (
            sra.patched(pipe, sra.SparseRef("mass", 0.25, multiple=2)),
            pytest.raises(IncompatibleError, match="attention cannot be measured under context parallelism"),
        ):
            case.call(pipe, steps=2)
        with (
            sra.patched(pipe, sra.SparseRef("grid", 0.25, "cache")),
            pytest.raises(IncompatibleError, match="need the whole sequence in one process, got context parallelism"),
        ):
            case.call(pipe, steps=2)
        np.testing.assert_allclose(case.call(pipe, steps=2), dense, atol=EXACT)
        assert np.abs(sparse - dense).max() > 100 * EXACT


def test_two_processes(tmp_path: Path) -> None:
    check(ranks, tmp_path)
