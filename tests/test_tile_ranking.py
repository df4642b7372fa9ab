"""Rankings of tiles by hand: floors and weights as one run's order has them, ragged edges, hidden tokens, shares."""

from __future__ import annotations

import pytest
import torch

from sparse_ref_attn.errors import LayoutError
from sparse_ref_attn.reference_cache import Cells, TiledCache, TileRanking, Tiling
from sparse_ref_attn.selection import ranking as one_order

SIZES = (12, 6)
CELLS = Cells(((3, 4), (2, 3)), 2)
TILING = Tiling(3, (5, 4), 2)  # 3 x 2 tiles, those of the last row of two tokens


def mass(items: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(items, 6, sum(SIZES), generator=torch.Generator().manual_seed(seed))


def read(ranking: TileRanking, counts: tuple[int, ...], item: int, tile: int) -> list[int]:
    """Tokens that a tile of an item reads, counted from the item's first."""
    found, tiles = ranking.selection(0, counts), 7
    at = item * tiles + tile
    return (found.indices[found.known[at] : found.known[at + 1]] - item * sum(SIZES)).tolist()


@pytest.mark.parametrize("floors", [(0, 0), (2, 3)])
@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_competing_references_are_ordered_as_in_a_run(
    floors: tuple[int, ...], weights: tuple[float, ...] | None
) -> None:
    given = mass() - mass().amin(-1, keepdim=True)  # a run's order weighs what lies above the lowest score
    ranking = TileRanking(TILING, SIZES, shared=True, floors=floors, weights=weights)
    ranking.rank(0, given, (18,))
    for item in range(2):
        for tile in range(6):
            order = one_order.order(given[item, tile].split(SIZES), floors, weights).tolist()
            for count in (5, 9, 18):
                assert read(ranking, (count,), item, tile + 1) == order[:count]


def test_the_text_reads_by_the_sum_over_the_tiles() -> None:
    given, ranking = mass(), TileRanking(TILING, SIZES)
    ranking.rank(0, given, SIZES)
    sizes = torch.tensor([4.0, 4, 4, 4, 2, 2])
    assert TILING.generation_sizes == (4, 4, 4, 4, 2, 2)
    pooled = torch.einsum("btr,t->br", given, sizes) / 20
    torch.testing.assert_close(ranking.pooled(given), pooled)
    for item in range(2):
        first, second = (part.argsort(descending=True).tolist() for part in pooled[item].split(SIZES))
        assert read(ranking, (3, 2), item, 0) == [*first[:3], *(12 + i for i in second[:2])]


def test_weights_of_the_means_count_what_a_tile_does_not_read() -> None:
    ranking = TileRanking(TILING, SIZES, CELLS)
    ranking.rank(0, mass(), SIZES)
    bias = ranking.selection(0, (5, 6)).bias
    assert bias is not None
    assert bias.shape == (14, 6)
    for item in range(2):
        for tile in range(7):
            left = set(range(18)) - set(read(ranking, (5, 6), item, tile))
            wanted = [sum(int(CELLS.of_tokens[token]) == cell for token in left) for cell in range(6)]
            assert bias[item * 7 + tile].exp().round().tolist() == wanted
    assert bias[:, 4:].isneginf().all()  # all of the second reference is read


def test_hidden_tokens_are_read_by_nobody_and_in_no_mean() -> None:
    seen = torch.ones(2, 18).bool()
    seen[0, [0, 1, 4, 5, 17]] = False  # the whole first cell of the first item
    ranking = TileRanking(TILING, SIZES, CELLS)
    cache = TiledCache(1, ranking)
    cache.hide(seen)
    k = torch.randn(2, 18, 1, 4)
    cache.store(0, k, k)
    ranking.rank(0, mass(), SIZES)
    hidden = {0, 1, 4, 5, 17}
    for tile in range(7):
        assert len(read(ranking, (10, 6), 0, tile)) == 8 + 5  # what is left of 12 and of 6
        assert not hidden & set(read(ranking, (10, 6), 0, tile))
        assert len(read(ranking, (10, 6), 1, tile)) == 16
    bias, (means, _) = ranking.selection(0, (10, 6)).bias, cache.means(0)
    assert bias is not None
    assert means is not None
    assert bias[:7, 0].isneginf().all()
    torch.testing.assert_close(means[0, 5], k[0, [14]].mean(0))  # the edge cell of the second, one of two hidden
    torch.testing.assert_close(means[1, 5], k[1, [14, 17]].mean(0))
    assert not means[0, 0].any()


def test_what_is_read_is_said_in_tokens_and_in_mass() -> None:
    given, ranking = mass(), TileRanking(TILING, SIZES, shared=True)
    ranking.rank(0, given, (18,))
    sizes = torch.tensor([4.0, 4, 4, 4, 2, 2]) / 20
    got = torch.zeros(2, 2)
    for item in range(2):
        for tile in range(6):
            for token in read(ranking, (7,), item, tile + 1):
                got[int(token >= 12)] += sizes[tile] / 2 * torch.tensor([1.0, given[item, tile, token]])
    whole = torch.stack([torch.einsum("btr,t->", part, sizes) / 2 for part in given.split(SIZES, -1)])
    torch.testing.assert_close(ranking.read((7,)), torch.stack([got[:, 0], got[:, 1] / whole], 1))


def test_the_same_tensors_until_the_layer_is_ranked_again() -> None:
    ranking = TileRanking(TILING, SIZES, CELLS)
    ranking.rank(0, mass(), SIZES)
    first = ranking.selection(0, (3, 2))
    assert ranking.selection(0, (3, 2)) is first
    assert ranking.selection(0, (4, 2)) is not first
    ranking.rank(0, mass(seed=1), SIZES)
    assert not torch.equal(ranking.selection(0, (3, 2)).indices, first.indices)
    ranking.forget(0)
    assert not ranking.knows((1, 1))


def test_rows_of_another_shape_are_refused() -> None:
    cache = TiledCache(1, TileRanking(TILING, SIZES))
    with pytest.raises(LayoutError, match=r"layer 0 must get k and v \(B, R, H, C\) = \(1, 18, 2, 4\)"):
        cache.store(0, torch.zeros(1, 17, 2, 4), torch.zeros(1, 17, 2, 4))
    cache.store(0, torch.zeros(1, 18, 2, 4), torch.zeros(1, 18, 2, 4))
    with pytest.raises(LayoutError, match=r"in torch\.float64"):
        cache.store(0, torch.zeros(1, 18, 2, 4).double(), torch.zeros(1, 18, 2, 4).double())
