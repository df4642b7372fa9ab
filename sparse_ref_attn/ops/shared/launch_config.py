"""Configurations of the Triton kernels: what one is, and which row of an op's table a card takes.

The tables, in each op's ``impl/tuning.py``, were chosen from what the compiler makes of the candidates; the page
docs/configurations.md has the figures of every row. `tests/ops/test_*_compiled.py` hold them, and `benchmarks/tune.py`
times the candidates on a card.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Config", "Table", "capability_of", "config_for"]


class Config(NamedTuple):
    """Queries and keys of one tile, warps of one program, stages of the software pipeline.

    ``split``: the kernels of `gather_attention` that walk over keys do so in two loops, whole tiles without a mask and
    then the rest. One loop with a mask takes fewer registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    split: bool = True


Table = dict[tuple[int, int], Config]
"""(row, head dim) -> configuration. Rows are capabilities, and 942 AMD's gfx942."""


def config_for(table: Table, capability: int, channels: int) -> Config:
    """The configuration of a card: its own row; 103 takes those of 100, and 942 has the rows of 80 beside its own.

    86, 89 and 120 have 99 KiB of shared memory and no warp-group instructions: they take the rows of 80. So does
    what is not known here.
    """
    older = {942: (942, 80), 90: (90,), 100: (100,), 103: (100,)}.get(capability, (80,))
    return next(table[row, channels] for row in older if (row, channels) in table)


def capability_of(x: Tensor) -> int:
    """90 for compute capability 9.0; 80 under the interpreter; 942 on AMD's cards, whatever their name."""
    if x.device.type != "cuda":
        return 80
    if torch.version.hip:
        return 942
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
