"""Problems whose selections are those of query tiles."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from .problems import Problem, make, tiling

Row = tuple[int, ...]


def make_tiles(
    tiles: tuple[Row, ...] | tuple[tuple[Row, ...], ...],
    keys: tuple[Row, ...] | None,
    kept: Row | tuple[Row, ...] | None,
    bank: int = 0,
    *,
    means: Row | None = None,
    seed: int = 0,
    **options: object,
) -> Problem:
    """Random operands. `tiles` are lengths by item, or by part and item; `kept` is per tile, in the order of q.

    `means` are rows of k2 per item, with a random bias for each tile, some of it -inf.
    """
    parts = tiles if tiles and isinstance(tiles[0][0], tuple) else (tiles,)
    lengths = tuple(length for part in parts for item in part for length in item)
    queries = tuple(tuple(sum(item) for item in part) for part in parts)
    problem = make(queries, keys, kept, bank, second=means, seed=seed, **options)
    problem.layout["cu_tiles"] = tiling((lengths,))[0]
    if means is not None:
        generator = torch.Generator().manual_seed(seed + 1)
        shape = len(lengths), max(means)
        bias = torch.randn(shape, generator=generator)
        bias[torch.rand(shape, generator=generator) < 0.3] = float("-inf")
        problem.layout["bias"] = bias
    return problem


def tile_grid(channels: int) -> dict[str, Problem]:
    """What every kernel is tried on: tiles on either side of a block of 16 or 32, and of nothing."""
    blind = make_tiles(((16, 5),), ((3,),), (0, 4), 9, means=(7,), channels=channels)
    blind.layout["bias"][0] = float("-inf")
    nothing = make_tiles(((16, 5),), ((0,),), (0, 4), 9, means=(7,), channels=channels)
    nothing.layout["bias"][0] = float("-inf")
    alone = make_tiles(((4, 33), (2,)), None, (0, 3, 5), 9, channels=channels)
    return {
        "tiles alike": make_tiles(((16, 16, 16, 16),), ((65,),), (34, 34, 34, 34), 40, means=(9,), channels=channels),
        "one tile, one query": make_tiles(((1,),), ((1,),), (1,), 1, means=(1,), channels=channels),
        "ragged tiles of ragged items": make_tiles(
            ((7, 33, 1), (16,), (2, 17)), ((33, 2, 32),), (33, 0, 64, 5, 1, 36), 70, means=(34, 3, 0), heads=1,
            channels=channels,
        ),
        "tiles of text and image rows apart": make_tiles(
            (((2,), (33,)), ((16, 17), (5, 1))), ((3, 33), (32, 6)), (34, 4, 9, 0, 2, 7), 40, heads=1, channels=channels
        ),
        "biased rows of parts and grouped heads": make_tiles(
            (((2,), (33,)), ((16, 17), (5, 1))), ((3, 33),), (34, 4, 9, 0, 2, 7), 40, means=(20, 8),
            heads=4, key_heads=2, channels=channels,
        ),
        "empty tiles and items": make_tiles(
            ((0, 3, 0), (0,), (17, 0)), ((0, 4, 0),), (2, 0, 3, 1, 4, 0), 8, means=(2, 0, 3), heads=1, channels=channels
        ),
        "a tile that sees its item alone": blind,
        "a tile that sees nothing": nothing,
        "a tile without keys": alone,
        "means alone": make_tiles(((16, 5), (33,)), ((3, 0),), None, means=(7, 35), channels=channels),
        "rows named twice": make_tiles(((16, 5),), ((3,),), (40, 6), 5, repeats=True, means=(7,), channels=channels),
        "a selection per key head": make_tiles(
            ((16, 5), (33,)), ((3, 2),), ((34, 0, 4), (3, 9, 0)), 40, means=(7, 3), heads=4, key_heads=2,
            channels=channels,
        ),
    }  # fmt: skip


@st.composite
def ragged_tiles(
    draw: st.DrawFn, longest: st.SearchStrategy[int], bank: int, channels: st.SearchStrategy[int]
) -> Problem:
    """Any way to cut at most three items of one part or two into at most three tiles each."""
    items = draw(st.integers(1, 3))

    def row(count: int) -> Row:
        return tuple(draw(longest) for _ in range(count))

    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    parts = draw(st.integers(1, 2))
    tiles = tuple(tuple(row(draw(st.integers(1, 3))) for _ in range(items)) for _ in range(parts))
    count = sum(len(item) for part in tiles for item in part)
    keys = draw(st.sampled_from([0, 1, 2]))
    means = row(items) if keys == 1 and draw(st.booleans()) else None
    kept = None
    if means is None or draw(st.booleans()):
        kept = tuple(row(count) for _ in range(key_heads)) if draw(st.booleans()) else row(count)
    repeats = draw(st.booleans())
    return make_tiles(
        tiles, tuple(row(items) for _ in range(keys)) if keys else None, kept, bank // 5 if repeats else bank,
        means=means, heads=key_heads * group, key_heads=key_heads, channels=draw(channels), repeats=repeats,
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip
