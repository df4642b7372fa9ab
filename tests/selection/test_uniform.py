"""Random repeats with its seed; every prefix of Grid covers the reference evenly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ref_attn.errors import PixelsUnavailableError
from sparse_ref_attn.selection import Grid, Random, References, spread_order
from sparse_ref_attn.types import Reference, TokenLayout

from .scenes import references


def test_random_repeats_with_its_seed_and_differs_without():
    first, again, other = (Random().score(references([(6, 5), (1, 1)], seed=s)) for s in (3, 3, 4))
    assert [s.shape for s in first] == [(30,), (1,)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_random_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    Random().score(references([(4, 4)]))
    assert torch.equal(before, torch.random.get_rng_state())


def test_random_references_are_independent():
    a, b = Random().score(references([(8, 8), (8, 8)]))
    assert not torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_every_prefix_of_the_grid_order_is_even(height, width, data):
    order = torch.tensor(spread_order(height, width))
    assert order.sort().values.equal(torch.arange(height * width))
    count = data.draw(st.integers(1, height * width))
    cells = torch.stack([order // width, order % width], dim=1).double()
    distances = torch.cdist(cells, cells[:count], compute_mode="donot_use_mm_for_euclid_dist")
    gap = distances.min(1).values.max().item()
    # Farthest-point order: the k chosen cells are at least `gap` apart, so discs of half that radius
    # around them are disjoint and fit into the grid grown by that radius.
    apart = torch.pdist(cells[:count]).min().item() if count > 1 else math.inf
    assert apart >= gap - 1e-9
    if count > 1:
        assert count * math.pi * (gap / 2) ** 2 <= (height - 1 + gap) * (width - 1 + gap) + 1e-9


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.375, 0.5, 0.7])
@pytest.mark.parametrize("grid", [(64, 64), (24, 100), (45, 80), (68, 60)])
def test_each_quadrant_gets_its_share(grid, share):
    score = Grid().score(references([grid]))[0]
    count = round(share * len(score))
    kept = torch.zeros(len(score)).index_fill_(0, score.topk(count).indices, 1).reshape(grid)
    for rows in (kept[: grid[0] // 2], kept[grid[0] // 2 :]):
        for quadrant in (rows[:, : grid[1] // 2], rows[:, grid[1] // 2 :]):
            assert quadrant.mean().item() == pytest.approx(share, rel=0.25)


def test_grid_needs_a_grid():
    layout = TokenLayout(rows=5, text=0, generation=(0, 0), references=(Reference(0, 5, None),))
    with pytest.raises(PixelsUnavailableError, match="without a grid"):
        Grid().score(References(layout, torch.zeros(1, 5, 4)))


def test_grid_of_one_token():
    assert Grid().score(references([(1, 1)]))[0].tolist() == [1.0]
