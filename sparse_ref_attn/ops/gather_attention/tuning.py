"""Tile sizes of the Triton kernels, by compute capability and head dim.

Chosen from what the compiler makes of them (no spills, shared memory within the card, the gather pipelined), not from
timings: no card has run them yet. `tests/ops/test_gather_attention_compiled.py` holds the limits, and
`benchmarks/tune.py` times the candidates on a card.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FORWARD", "GRAD_KV", "GRAD_Q", "Config", "config_for"]


class Config(NamedTuple):
    """Queries and keys of one tile, warps of one program, stages of the software pipeline.

    ``split``: the kernels that walk over keys do so in two loops, whole tiles without a mask and then the rest. One
    loop with a mask takes fewer registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    split: bool = True


# (row, head dim) -> configuration. Rows are capabilities, and 942 AMD's gfx942; `config_for` picks the row of a card.
FORWARD = {
    (80, 32): Config(128, 64, 4, 3),
    (80, 64): Config(128, 64, 8, 3),
    (80, 128): Config(128, 64, 8, 2, split=False),
    (90, 32): Config(128, 64, 4, 3),
    (90, 64): Config(128, 64, 4, 3),
    (90, 128): Config(128, 64, 8, 3),
    (942, 128): Config(128, 32, 8, 2),
}
GRAD_Q = {
    (80, 32): Config(128, 64, 8, 2),
    (80, 64): Config(128, 64, 8, 2),
    (80, 128): Config(128, 32, 8, 3, split=False),
    (90, 32): Config(128, 64, 4, 2),
    (90, 64): Config(128, 64, 8, 2),
    (90, 128): Config(128, 64, 8, 2),
    (100, 32): Config(128, 64, 8, 2),
}
# A program owns block_n keys and walks over the queries.
GRAD_KV = {
    (80, 32): Config(32, 64, 4, 2),
    (80, 64): Config(32, 64, 4, 2),
    (80, 128): Config(64, 64, 8, 2),
    (90, 32): Config(64, 64, 4, 2),
    (90, 64): Config(64, 64, 4, 2),
    (90, 128): Config(32, 128, 8, 2),
    (100, 64): Config(64, 64, 8, 2),
    (100, 128): Config(16, 64, 8, 2),
    (942, 128): Config(32, 64, 4, 1),
}


def config_for(table: dict[tuple[int, int], Config], capability: int, channels: int) -> Config:
    """The configuration of a card: its own row where there is one, else the next older one of its kind.

    86, 89 and 120 have 99 KiB of shared memory and no warp-group instructions: they take the rows of 80.
    """
    older = {942: (942, 80), 90: (90,), 100: (100, 90), 103: (100, 90)}.get(capability, (80,))
    return next(table[row, channels] for row in older if (row, channels) in table)
