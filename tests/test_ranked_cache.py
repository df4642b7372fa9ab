"""Rows in rank order beside a room, against a dictionary of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.errors import BudgetError, LayoutError
from sparse_ref_attn.reference_cache import RankedCache

ROWS, B, H, C = 9, 2, 3, 4


def rows_of(layer: int) -> tuple[Tensor, Tensor]:
    """A layer's k and v of all rows, each row telling its layer, item and number."""
    base = 1000 * layer + 100 * torch.arange(B).view(B, 1, 1, 1) + torch.arange(ROWS).view(1, ROWS, 1, 1)
    k = base.expand(B, ROWS, H, C).float()
    return k, -k


def order_of(layer: int, count: int = ROWS) -> Tensor:
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(layer))[:count]


def own_rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(B, count, H, C, generator=torch.Generator().manual_seed(seed)) + 10_000


def as_set(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.flatten().tolist()) for row in x.transpose(0, 1)}


def check(cache: RankedCache, layer: int, order: Tensor, count: int, own: int) -> None:
    """`join` gives the call's own rows and the best `count`, in one contiguous range of a buffer."""
    k, v = rows_of(layer)
    mine = own_rows(own, layer)
    keys, values = cache.join(layer, mine, mine + 1, count)
    for got, stored, given in ((keys, k, mine), (values, v, mine + 1)):
        assert got.shape == (B, own + count, H, C)
        assert as_set(got) == as_set(torch.cat([stored[:, order[:count]], given], 1))
        assert got.stride()[1:] == (H * C, C, 1)
        at = 0 if layer % 2 else count
        assert torch.equal(got[:, at : at + own], given)  # in their order: callers slice nothing out of them


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("room", [4, 1])
def test_any_prefix_stands_beside_the_calls_own_rows(layers: int, room: int) -> None:
    cache = RankedCache([7 - layer for layer in range(layers)], room)  # each layer its own number
    for layer in range(layers):
        cache.store(layer, *rows_of(layer), order_of(layer, 7 - layer))
    for own in (4, 3, 1, 6):  # 6 is more than the room
        for count in (0, 1, 3, 2):
            for layer in range(layers):
                check(cache, layer, order_of(layer), min(count, 7 - layer), own)


def test_joining_writes_only_the_room() -> None:
    cache = RankedCache([5, 5], 3)
    for layer in (0, 1):
        cache.store(layer, *rows_of(layer), order_of(layer, 5))
    for layer in (0, 1, 0, 1):
        cache.join(layer, own_rows(3), own_rows(3), 5)
        for each in (0, 1):
            k, v = cache.prefix(each, 5)
            assert as_set(k) == as_set(rows_of(each)[0][:, order_of(each, 5)])
            assert as_set(v) == as_set(rows_of(each)[1][:, order_of(each, 5)])


def test_rearranged_shrunk_and_grown_rows_are_the_same_rows() -> None:
    cache = RankedCache([ROWS] * 3, 2)
    for layer in range(3):
        cache.store(layer, *rows_of(layer), order_of(layer))
    for layer in range(3):
        cache.rearrange(layer, order_of(layer + 10))
        check(cache, layer, order_of(layer + 10), 4, 2)
    before = cache.row_bytes, cache.room_bytes
    cache.shrink([6, 3, 5])
    assert cache.row_bytes == before[0] * 14 // 27
    assert cache.room_bytes == before[1] == 2 * 2 * (2 * B * H * C * 4)  # two rooms of two rows, k and v
    for layer, count in enumerate((6, 3, 5)):
        check(cache, layer, order_of(layer + 10), count, 2)
    assert cache.reserve(5)
    assert not cache.reserve(5)
    for layer, count in enumerate((6, 3, 5)):
        check(cache, layer, order_of(layer + 10), count, 5)


@pytest.mark.parametrize("layer", [0, 1])
def test_all_rows_say_which_they_are(layer: int) -> None:
    cache = RankedCache([ROWS, ROWS], 4)
    for each in (0, 1):
        cache.store(each, *rows_of(each), order_of(each))
    cache.join(layer, own_rows(3), own_rows(3), 2)
    keys, values, (first, last), tokens = cache.all_of(layer, 3)
    assert keys.shape[1] == ROWS + 3
    assert torch.equal(keys[:, first:last], rows_of(layer)[0][:, tokens])
    assert torch.equal(values[:, first:last], rows_of(layer)[1][:, tokens])


def test_what_does_not_fit_is_refused() -> None:
    cache = RankedCache([4, 4], 2)
    with pytest.raises(LayoutError, match=r"layer 0 must get 4 rows .* got 3 rows"):
        cache.store(0, *rows_of(0), order_of(0, 3))
    cache.store(0, *rows_of(0), order_of(0, 4))
    with pytest.raises(LayoutError, match=r"float32 on cpu, got .* in torch.float64"):
        cache.store(1, *(x.double() for x in rows_of(1)), order_of(1, 4))
    with pytest.raises(BudgetError, match="layer 0 holds 4 reference rows, got a budget of 5"):
        cache.join(0, own_rows(2), own_rows(2), 5)
    with pytest.raises(LayoutError, match=r"must fit the stored reference keys, .* got \(1, 2, 3, 4\)"):
        cache.join(0, own_rows(2)[:1], own_rows(2)[:1], 1)
