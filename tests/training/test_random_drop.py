"""The draws: their distributions, that every token is equally likely, floors, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats

import sparse_ref_attn as sra
from sparse_ref_attn.training.draws import _generator
from tests.pictures import generator

DRAWS = 1500
LOW, HIGH = 0.1, 0.8
CDF: dict[str, Callable[..., object]] = {  # of scipy's own
    "uniform": stats.uniform(LOW, HIGH - LOW).cdf,
    "log_uniform": stats.loguniform(LOW, HIGH).cdf,
    "arcsine": stats.arcsine(LOW, HIGH - LOW).cdf,
}


@pytest.mark.parametrize("distribution", list(CDF))
def test_keep_ratios_follow_the_distribution(distribution: str) -> None:
    """Of 1,000 tokens, so that rounding to whole tokens hides below the test's own noise."""
    drop = sra.RandomDrop((LOW, HIGH), distribution)
    ratios = [drop.draw((1000,), _generator(0, 0, i)).kept / 1000 for i in range(DRAWS)]
    assert min(ratios) >= LOW
    assert max(ratios) <= HIGH
    assert stats.kstest(ratios, CDF[distribution]).pvalue > 0.01
    for other, cdf in CDF.items():
        assert other == distribution or stats.kstest(ratios, cdf).pvalue < 1e-6


@pytest.mark.parametrize("sizes", [(40,), (24, 16), (5, 1, 34)])
def test_every_token_is_equally_likely(sizes: tuple[int, ...]) -> None:
    drop, times, kept = sra.RandomDrop((0.1, 0.9)), torch.zeros(sum(sizes)), 0
    for i in range(DRAWS):
        selection = drop.draw(sizes, _generator(1, 0, i))
        times[selection.indices] += 1
        kept += selection.kept
    # Tokens of a draw are dependent and draws are not, so a token's count has the variance of DRAWS coins of bias p.
    p = kept / DRAWS / sum(sizes)
    z = (times - DRAWS * p) / math.sqrt(DRAWS * p * (1 - p))
    assert z.abs().max() < 4.0
    assert 0.5 < z.std() < 1.5


def test_every_pair_is_equally_likely() -> None:
    """Neighbours are not kept together more often than others."""
    together = torch.zeros(8, 8)
    for i in range(DRAWS):
        indices = sra.RandomDrop(0.5).draw((8,), _generator(2, 0, i)).indices
        together[indices[:, None], indices] += 1
    pairs = together[~torch.eye(8, dtype=torch.bool)]
    p = 4 / 8 * 3 / 7
    assert ((pairs - DRAWS * p) / math.sqrt(DRAWS * p * (1 - p))).abs().max() < 4.0


def test_full_draws() -> None:
    drop = sra.RandomDrop((0.1, 0.2), full_probability=0.25)
    full = sum(drop.draw((40,), _generator(3, 0, i)).kept == 40 for i in range(DRAWS))
    assert stats.binomtest(full, DRAWS, 0.25).pvalue > 0.01
    assert sra.RandomDrop(0.1, full_probability=1.0).draw((40,)).kept == 40


@pytest.mark.parametrize(("floor", "least"), [(2, (2, 2, 1)), (0.25, (8, 2, 0))])
def test_floors(floor: float | int, least: tuple[int, ...]) -> None:
    """A reference of one token cannot give two, so it is asked for a ratio that it has."""
    sizes = (32, 8, 1) if isinstance(floor, float) else (32, 8, 2)
    least = tuple(min(a, b) for a, b in zip(least, sizes, strict=True)) if isinstance(floor, float) else (2, 2, 2)
    drop = sra.RandomDrop(0.05, floor_per_reference=floor)
    for i in range(200):
        selection = drop.draw(sizes, _generator(4, 0, i))
        assert all(kept >= low for kept, low in zip(selection.counts(), least, strict=True))
        assert selection.kept == sum(least)


def test_at_least_one_token_stays() -> None:
    assert sra.RandomDrop(0.01).draw((3, 4)).kept == 1


def test_a_seed_repeats_and_the_global_stream_is_not_touched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    drop = sra.RandomDrop()
    first, second, third = (drop.draw((99,), generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.indices, second.indices)
    assert not torch.equal(first.indices, third.indices)
    assert torch.equal(torch.rand(1), expected)


def test_streams_of_ranks_and_steps_differ() -> None:
    keys = [(seed, rank, draw) for seed in range(3) for rank in range(3) for draw in range(50)]
    numbers = torch.cat([torch.rand(1, generator=_generator(*key), dtype=torch.float64) for key in keys])
    assert len(numbers.unique()) == len(keys)
    assert stats.kstest(numbers, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0}, r"0 < low <= high <= 1, got 0"),
        ({"keep": (0.0, 0.5)}, r"0 < low <= high <= 1, got \(0.0, 0.5\)"),
        ({"keep": (0.5, 0.1)}, r"0 < low <= high <= 1, got \(0.5, 0.1\)"),
        ({"keep": (0.5, 1.1)}, r"0 < low <= high <= 1"),
        ({"keep": 256}, r"0 < low <= high <= 1, got 256"),
        ({"keep": float("nan")}, r"0 < low <= high <= 1, got nan"),
        ({"keep": "half"}, r"keep must be a ratio or \(low, high\), got 'half'"),
        ({"keep": (0.1, 0.2, 0.3)}, r"keep must be a ratio or \(low, high\)"),
        ({"keep": (True, 1.0)}, r"keep must be a ratio or \(low, high\)"),
        ({"distribution": "normal"}, "distribution must be one of uniform, log_uniform, arcsine, got 'normal'"),
        ({"per_sample": 1}, "per_sample must be a bool, got 1"),
        ({"full_probability": 1.5}, r"full_probability must lie in \[0, 1\], got 1.5"),
        ({"full_probability": None}, r"full_probability must lie in \[0, 1\], got None"),
        ({"floor_per_reference": -1}, "floor_per_reference must be a ratio .* got -1"),
        ({"floor_per_reference": 1.5}, r"floor_per_reference as a ratio must lie in \[0, 1\], got 1.5"),
        ({"seed": -1}, "seed must be an int of at least 0, got -1"),
    ],
)
def test_bad_settings(settings: dict, words: str) -> None:
    with pytest.raises(sra.ConfigError, match=words):
        sra.RandomDrop(**settings)


def test_a_floor_that_a_reference_does_not_have() -> None:
    with pytest.raises(sra.BudgetError, match="floor must not exceed reference 1's 3 tokens, got 5"):
        sra.RandomDrop(floor_per_reference=5).draw((8, 3))


def test_unknown_names_in_a_dictionary() -> None:
    with pytest.raises(sra.ConfigError, match="known settings only, got keeep"):
        sra.RandomDrop.from_dict({"keeep": 0.5})
