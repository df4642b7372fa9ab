"""Klein-KV under diffusers' context parallelism: the pipeline itself fails there, and a patch says why."""

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


def ranks() -> None:
    """What each of two gloo processes sees."""
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 8  # diffusers asks it for the mesh of a CPU
    dist.init_process_group("gloo")
    case = CASES["klein_kv"]
    pipe = case.build()
    alone = case.call(pipe, references=2, steps=2)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(RuntimeError, match="must match the size of tensor"):  # diffusers', without any patch
        case.call(pipe, references=2, steps=2)
    for execute in ("tokens", "cache", "both"):
        with (
            sra.patched(pipe, sra.SparseRef("grid", 0.25, execute)),
            pytest.raises(IncompatibleError, match="cannot run under context parallelism"),
        ):
            case.call(pipe, references=2, steps=2)
    assert np.isfinite(alone).all()
    dist.destroy_process_group()
    print("as expected")


def test_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", __name__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.stdout.count("as expected") == 2, done.stdout + done.stderr


if __name__ == "__main__":
    ranks()
