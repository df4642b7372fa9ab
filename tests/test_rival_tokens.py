"""What `ToMe` and `Downscale` make of a reference's tokens, against brute force."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn import rivals
from sparse_ref_attn.selection import References
from tests.pictures import generator


def references(tokens: Tensor, *grids: tuple[int, int], pixels: tuple = (), encode: Any = None) -> References:
    found, at = [], 4
    for height, width in grids:
        found.append(sra.Reference(at, height * width, (height, width)))
        at += height * width
    return References(sra.TokenLayout(at, 0, (0, 4), tuple(found)), tokens, pixels, encode=encode)


# -- token merging ---------------------------------------------------------------------------------------------------


def merge_by_loops(tokens: np.ndarray, grid: tuple[int, int], keep: int) -> dict[int, list[int]]:
    """Which tokens of (B, R, D) went into each that is left: the definition, in loops and float64."""
    height, width = grid
    groups = {r: [r] for r in range(height * width)}

    def mean(item: int, members: list[int]) -> np.ndarray:
        return sum(tokens[item, r] for r in members) / len(members)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    while len(groups) > keep:
        number = len(groups)
        side = max(2, round(2 * (height * width / number) ** 0.5))
        while True:
            cells: dict[tuple[int, int], int] = {}
            for r in sorted(groups):
                cells.setdefault((r // width // side, r % width // side), r)
            if len(cells) < number:
                break
            side += 1
        targets = sorted(cells.values())
        pairs = []
        for source in sorted(set(groups) - set(targets)):
            likeness = [
                sum(cosine(mean(b, groups[source]), mean(b, groups[t])) for b in range(len(tokens))) for t in targets
            ]
            pairs.append((-max(likeness), source, targets[int(np.argmax(likeness))]))
        for _, source, target in sorted(pairs)[: min(number - keep, number // 2)]:
            groups[target] = groups[target] + groups.pop(source)
    return dict(sorted(groups.items()))


@pytest.mark.parametrize("grid", [(5, 7), (1, 9), (6, 6), (8, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_merging_equals_brute_force_at_every_count(grid, batch):
    count = grid[0] * grid[1]
    tokens = torch.randn(batch, count, 5, generator=generator(3))
    for keep in range(1, count + 1):
        (merged,) = sra.ToMe().reduce(references(tokens, grid), (keep,))
        groups = merge_by_loops(tokens.double().numpy(), grid, keep)
        assert len(groups) == keep
        places = [[r // grid[1], r % grid[1]] for r in groups]
        assert merged.positions.tolist() == places
        means = torch.stack([tokens[:, members].double().mean(1) for members in groups.values()], 1)
        torch.testing.assert_close(merged.tokens, means.float(), rtol=1e-6, atol=1e-7)


def test_merging_keeps_all_tokens_as_they_are():
    tokens = torch.randn(2, 6 + 4, 3, generator=generator())
    first, second = sra.ToMe().reduce(references(tokens, (2, 3), (2, 2)), (6, 2))
    assert torch.equal(first.tokens, tokens[:, :6])
    assert first.positions.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert second.tokens.shape == (2, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_nothing_is_merged_into_are_bit_exact(dtype):
    tokens = torch.randn(1, 64, 4, generator=generator()).to(dtype)
    (merged,) = sra.ToMe().reduce(references(tokens, (8, 8)), (60,))
    assert merged.tokens.dtype == dtype
    at = (merged.positions[:, 0] * 8 + merged.positions[:, 1]).long()
    same = (merged.tokens == tokens[:, at]).all(-1).sum()
    assert 56 <= same < 60


@pytest.mark.parametrize("reducer", [sra.ToMe(), sra.Downscale("latents")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_references_stay_what_they_are(reducer, dtype):
    tokens = torch.randn(1, 64, 4, generator=generator()).to(dtype)
    seen = references(tokens.clone(), (8, 8))
    first = reducer.reduce(seen, (20,))[0].tokens
    assert torch.equal(seen.tokens, tokens)
    assert torch.equal(reducer.reduce(seen, (20,))[0].tokens, first)


def test_merging_repeated_tokens_loses_nothing():
    left, right = torch.tensor([0.1, 1 / 3, -0.7]), torch.tensor([-0.3, 0.2, 1e-3])
    tokens = torch.where((torch.arange(96) % 12 < 6)[:, None], left, right)[None]
    for keep in (90, 48, 24, 7, 2):
        (merged,) = sra.ToMe().reduce(references(tokens, (8, 12)), (keep,))
        side = merged.positions[:, 1] < 6
        assert side.any()
        assert (~side).any()
        assert torch.equal(merged.tokens[0], torch.where(side[:, None], left, right))


def test_items_of_a_batch_are_merged_alike_by_their_mean_similarity():
    tokens = torch.randn(2, 36, 4, generator=generator())
    tokens[1] *= 10  # cosine: length does not count
    (both,) = sra.ToMe().reduce(references(tokens, (6, 6)), (18,))
    alone = [sra.ToMe().reduce(references(item[None], (6, 6)), (18,))[0].positions for item in tokens]
    swapped = sra.ToMe().reduce(references(tokens.flip(0), (6, 6)), (18,))[0]
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(both.positions, swapped.positions)
    assert torch.equal(both.tokens, swapped.tokens.flip(0))


# -- a smaller reference: its grid and its places --------------------------------------------------------------------


def test_the_smaller_grid_is_the_finest_of_all_that_fit():
    for grid in [(1, 1), (1, 7), (4, 4), (5, 8), (9, 2)]:
        everything = [(h, w) for h in range(1, grid[0] + 1) for w in range(1, grid[1] + 1)]
        for count in range(1, grid[0] * grid[1] + 1):
            got = rivals._shrunk(grid, count)

            def quality(small: tuple[int, int], grid: tuple[int, int] = grid) -> tuple[Fraction, int]:
                return min(Fraction(s, g) for s, g in zip(small, grid, strict=True)), small[0] * small[1]

            best = max(quality(small) for small in everything if small[0] * small[1] <= count)
            assert got[0] * got[1] <= count
            assert quality(got) == best
        assert got == grid


def test_places_of_the_smaller_grid_spread_over_the_whole_reference():
    assert rivals._positions((3, 4), (3, 4)).tolist() == [[y, x] for y in range(3) for x in range(4)]
    assert rivals._positions((4, 9), (2, 3)).tolist() == [[y, x] for y in (0.5, 2.5) for x in (1, 4, 7)]
    torch.testing.assert_close(rivals._positions((7, 12), (5, 5)).mean(0), torch.tensor([3.0, 5.5]))


def test_latents_are_averaged_over_areas():
    grid = torch.arange(6.0)[:, None] * 10 + torch.arange(9.0)
    tokens = torch.stack([grid, -2 * grid], -1).reshape(1, 54, 2).repeat(2, 1, 1)
    (small,) = sra.Downscale("latents").reduce(references(tokens, (6, 9)), (6,))
    mean = grid.reshape(2, 3, 3, 3).mean((1, 3)).flatten()
    torch.testing.assert_close(small.tokens, torch.stack([mean, -2 * mean], -1).expand(2, 6, 2))
    assert torch.equal(grid.reshape(-1)[(small.positions[:, 0] * 9 + small.positions[:, 1]).long()], mean)


def test_a_vae_that_gives_another_grid_is_refused():
    tokens = torch.zeros(1, 16, 4)
    seen = references(tokens, (4, 4), pixels=(torch.zeros(1, 3, 32, 32),), encode=lambda x: (tokens, (4, 4)))
    with pytest.raises(sra.LayoutError, match=r"encoded at 16 x 16 pixels must give a grid of \(2, 2\)"):
        sra.Downscale().reduce(seen, (4,))
