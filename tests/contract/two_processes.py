"""Two gloo processes that run a module's ``ranks`` under diffusers' context parallelism."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["as_a_rank", "check"]

ROOT = Path(__file__).resolve().parents[2]
SAID = "as expected"


def check(module: str) -> None:
    """Run `module` in both; each must get to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.stdout.count(SAID) == 2, done.stdout + done.stderr


def as_a_rank(ranks: Callable[[], None]) -> None:
    """Run `ranks` as one of them."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 8  # diffusers asks it for the mesh of a CPU
    dist.init_process_group("gloo")
    ranks()
    dist.destroy_process_group()
    print(SAID)
