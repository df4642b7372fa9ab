"""Two gloo processes that run a function under diffusers' context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.programs import run_pair

__all__ = ["check"]


def check(ranks: Callable[[], None], folder: Path) -> None:
    """Run `ranks` in both; each must get to its end."""
    run_pair(_rank, ranks, folder=folder)


def _rank(ranks: Callable[[], None]) -> None:
    torch.accelerator.device_count = lambda: 8  # diffusers asks it for the mesh of a CPU
    dist.init_process_group("gloo")
    ranks()
    dist.destroy_process_group()
