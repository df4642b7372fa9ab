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


# (least capability, head dim) -> configuration. The rows of 80 also suit cards with 99 KiB of shared memory.
FORWARD = {
    (80, 32): Config(128, 64, 4, 3),
    (80, 64): Config(128, 64, 8, 3),
    (80, 128): Config(128, 64, 8, 2, split=False),
    (90, 32): Config(128, 64, 4, 3),
    (90, 64): Config(128, 64, 4, 3),
    (90, 128): Config(128, 64, 8, 3),
}
GRAD_Q = {
    (80, 32): Config(128, 64, 8, 2),
    (80, 64): Config(128, 64, 8, 2),
    (80, 128): Config(128, 32, 8, 3, split=False),
    (90, 32): Config(128, 64, 4, 2),
    (90, 64): Config(128, 64, 8, 2),
    (90, 128): Config(128, 64, 8, 2),
}
# A program owns block_n keys and walks over the queries.
GRAD_KV = {
    (80, 32): Config(64, 64, 4, 2),
    (80, 64): Config(64, 64, 8, 2),
    (80, 128): Config(64, 64, 8, 2),
    (90, 32): Config(64, 64, 4, 2),
    (90, 64): Config(64, 64, 4, 2),
    (90, 128): Config(32, 128, 8, 2),
}


def config_for(table: dict[tuple[int, int], Config], capability: int, channels: int) -> Config:
    """The row of a card. 90 and 100 have 227 KiB of shared memory; 86, 89 and 120 have 99 and take the rows of 80."""
    return table[90 if 90 <= capability < 120 else 80, channels]
