"""Configurations of the kernels, by row and head dim; docs/configurations.md says what each was chosen by."""

from __future__ import annotations

from ...shared.launch_config import Config, Table

__all__ = ["LSE", "MASS", "TILE_MASS"]

# A program owns block_n reference rows and walks over the queries.
MASS: Table = {
    (80, 32): Config(64, 64, 4, 3),
    (80, 64): Config(64, 64, 4, 3),
    (80, 128): Config(64, 64, 4, 3),
    (90, 32): Config(128, 64, 4, 3),
    (90, 64): Config(128, 64, 4, 3),
    (90, 128): Config(128, 64, 4, 2),
    (100, 32): Config(128, 128, 4, 3),
    (100, 64): Config(128, 128, 4, 2),
    (100, 128): Config(128, 128, 4, 2),
}
# A program owns block_m queries and walks over the keys.
LSE: Table = {
    (80, 32): Config(128, 64, 4, 3),
    (80, 64): Config(128, 64, 4, 3),
    (80, 128): Config(128, 64, 8, 2),
    (90, 32): Config(128, 128, 8, 2),
    (90, 64): Config(128, 128, 8, 2),
    (90, 128): Config(128, 128, 8, 2),
    (100, 32): Config(128, 128, 4, 3),
    (100, 64): Config(128, 128, 8, 3),
    (100, 128): Config(128, 128, 8, 2),
}
# A program owns block_n reference rows and block_m queries, and walks over the heads.
TILE_MASS: Table = {
    (80, 32): Config(64, 128, 4, 3),
    (80, 64): Config(64, 128, 4, 3),
    (80, 128): Config(128, 128, 8, 2),
    (90, 32): Config(64, 128, 4, 3),
    (90, 64): Config(64, 128, 4, 3),
    (90, 128): Config(128, 128, 8, 3),
    (100, 32): Config(128, 64, 4, 3),
    (100, 64): Config(128, 64, 4, 3),
    (100, 128): Config(128, 128, 8, 3),
}
