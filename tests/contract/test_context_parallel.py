"""Dropping at the input under diffusers' context parallelism: two processes make the image of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import sparse_ref_attn as sra
from sparse_ref_attn.errors import IncompatibleError
from tests.pipelines import CASES

ROOT = Path(__file__).resolve().parents[2]
EXACT = 1e-5  # of an image in [0, 1]: the order of sums


def ranks() -> None:
    """What each of two gloo processes sees."""
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 8  # diffusers asks it for the mesh of a CPU
    dist.init_process_group("gloo")
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
        np.testing.assert_allclose(case.call(pipe, steps=2), dense, atol=EXACT)
        assert np.abs(sparse - dense).max() > 100 * EXACT
    dist.destroy_process_group()
    print("as expected")


def test_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", __name__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.stdout.count("as expected") == 2, done.stdout + done.stderr


if __name__ == "__main__":
    ranks()
