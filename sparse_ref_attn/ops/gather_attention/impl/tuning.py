"""Configurations of the kernels, by row and head dim; docs/configurations.md says what each was chosen by."""

from __future__ import annotations

from ...shared.launch_config import Config, Table

__all__ = ["FORWARD", "GRAD_KV", "GRAD_Q", "TILES"]

FORWARD: Table = {
    (80, 32): Config(64, 64, 4, 2, split=False),
    (80, 64): Config(64, 64, 4, 3, split=False),
    (80, 128): Config(128, 64, 8, 2, split=False),
    (90, 32): Config(128, 64, 4, 3),
    (90, 64): Config(128, 64, 4, 3, split=False),
    (90, 128): Config(128, 64, 8, 3),
    (100, 32): Config(128, 64, 4, 3, split=False),
    (100, 64): Config(128, 128, 8, 2, split=False),
    (100, 128): Config(128, 64, 8, 3, split=False),
    (942, 128): Config(128, 32, 8, 2),
}
# By the queries of a block: what tiles of 4 x 4 and of 8 x 8 tokens fill.
TILES: dict[int, Table] = {
    16: {
        (80, 32): Config(16, 64, 2, 3, split=False),
        (80, 64): Config(16, 64, 4, 3),
        (80, 128): Config(16, 64, 4, 3),
        (90, 32): Config(16, 64, 2, 3, split=False),
        (90, 64): Config(16, 64, 4, 3),
        (90, 128): Config(16, 64, 4, 3),
        (100, 32): Config(16, 64, 2, 3, split=False),
        (100, 64): Config(16, 64, 4, 3),
        (100, 128): Config(16, 64, 4, 3),
        (942, 128): Config(16, 32, 4, 2),
    },
    64: {
        (80, 32): Config(64, 64, 4, 3, split=False),
        (80, 64): Config(64, 64, 4, 3, split=False),
        (80, 128): Config(64, 32, 4, 2, split=False),
        (90, 32): Config(64, 64, 4, 3),
        (90, 64): Config(64, 64, 4, 3),
        (90, 128): Config(64, 64, 4, 3),
        (100, 32): Config(64, 64, 4, 3, split=False),
        (100, 64): Config(64, 64, 4, 3, split=False),
        (100, 128): Config(64, 64, 8, 2, split=False),
        (942, 128): Config(64, 32, 4, 2, split=False),
    },
}
GRAD_Q: Table = {
    (80, 32): Config(64, 64, 4, 2, split=False),
    (80, 64): Config(64, 32, 4, 3, split=False),
    (80, 128): Config(64, 32, 4, 2, split=False),
    (90, 32): Config(64, 64, 4, 2),
    (90, 64): Config(64, 64, 4, 3),
    (90, 128): Config(128, 64, 8, 3),
    (100, 32): Config(128, 64, 8, 2, split=False),
    (100, 64): Config(128, 64, 4, 2, split=False),
    (100, 128): Config(128, 64, 8, 2, split=False),
    (942, 128): Config(64, 32, 4, 1),
}
# A program owns block_n keys and walks over the queries.
GRAD_KV: Table = {
    (80, 32): Config(64, 64, 4, 2),
    (80, 64): Config(32, 64, 4, 2),
    (80, 128): Config(64, 64, 8, 2),
    (90, 32): Config(64, 64, 4, 2),
    (90, 64): Config(64, 64, 4, 2),
    (90, 128): Config(32, 128, 8, 2),
    (100, 32): Config(64, 128, 8, 2),
    (100, 64): Config(64, 128, 8, 2),
    (100, 128): Config(64, 128, 8, 2),
    (942, 128): Config(32, 64, 4, 1),
}
