"""The kernels of the mass per query tile, interpreted, against float64."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ref_attn.functional import attention_mass
from sparse_ref_attn.ops.attention_mass.impl.triton_tile_mass import launch_tile_mass
from sparse_ref_attn.ops.attention_mass.impl.tuning import TILE_MASS
from sparse_ref_attn.ops.attention_mass.reference import attention_mass_reference
from sparse_ref_attn.ops.attention_mass.trial import kind_of, small
from sparse_ref_attn.ops.shared.launch_config import Config
from sparse_ref_attn.ops.verdicts.table import usual_kinds

from ...pairwise import pairwise
from .. import mass_cases
from ..guards import Canaries
from ..mass_cases import lse_of
from ..rounding import assert_rounded, of_mass
from ..tolerance import assert_as_accurate

SMALL = Config(16, 32, 4, 2)
TILINGS = {
    "equal, two in a block": [0, 8, 16, 24, 32, 40],
    "equal, across blocks": [0, 20, 40],
    "one": [0, 40],
    "ragged": [0, 1, 5, 13, 33, 34, 40],
    "empty ones": [0, 0, 0, 16, 16, 32, 32, 40, 40, 40],
    "each query alone, then a long one": [*range(13), 40],
}
draw = partial(mass_cases.draw, C=32)


def check(mass: Tensor, q: Tensor, k: Tensor, span: tuple[int, int], scale: float, tiles: list[int], **more) -> None:
    """mass (B, H, T, R), or (B, T, R) of all heads."""
    truth = attention_mass_reference(q.double(), k.double(), span, scale, tiles=tiles, **more)
    low = attention_mass_reference(q, k, span, scale, tiles=tiles, **more)
    if mass.ndim == 3:
        truth, low = truth.mean(1), low.mean(1)
    assert_as_accurate(mass, truth, low)


@pairwise(name=list(TILINGS), reduce_heads=[True, False], dtype=[torch.float16, torch.bfloat16])
def test_each_tile_has_the_mean_of_its_own_queries(name: str, reduce_heads: bool, dtype: torch.dtype) -> None:
    q, k = draw(40, 55, dtype=dtype, batch=2, heads=3)
    lse = lse_of(q.double(), k.double(), 0.2).float()
    tiles = TILINGS[name]
    offsets = torch.tensor(tiles, dtype=torch.int32 if reduce_heads else torch.int64)
    with Canaries():
        mass = launch_tile_mass(q, k[:, 20:], lse, offsets, 0.2, reduce_heads, SMALL)
    assert mass.shape == ((2,) if reduce_heads else (2, 3)) + (len(tiles) - 1, 35)
    check(mass, q, k, (20, 55), 0.2, tiles)
    for tile, (start, stop) in enumerate(itertools.pairwise(tiles)):
        assert start < stop or not mass[..., tile, :].any()


@pytest.mark.parametrize("C", [32, 64, 128])
def test_float32_is_off_by_its_roundings_alone(C: int) -> None:
    q, k = draw(40, 55, C=C, dtype=torch.float32)
    lse = lse_of(q.double(), k.double(), C**-0.5)
    tiles = TILINGS["ragged"]
    with Canaries():
        mass = launch_tile_mass(q, k[:, 20:], lse.float(), torch.tensor(tiles), C**-0.5, False, SMALL)
    truth = attention_mass_reference(q.double(), k.double(), (20, 55), C**-0.5, tiles=tiles)
    for tile, (start, stop) in enumerate(itertools.pairwise(tiles)):
        deviation = of_mass(q[:, start:stop], k, (20, 55), C**-0.5)[0]
        assert_rounded(mass[:, :, tile], truth[:, :, tile], deviation)


@pytest.mark.parametrize(("C", "dtype"), [(32, torch.float32), (64, torch.float16), (128, torch.bfloat16)])
def test_shipped_configurations(C: int, dtype: torch.dtype) -> None:
    q, k = draw(150, 200, C=C, dtype=dtype)
    lse = lse_of(q.double(), k.double(), C**-0.5).float()
    tiles = [*range(0, 130, 16), 131, 150]
    for config in {TILE_MASS[capability, C] for capability in (80, 90, 100)}:
        with Canaries():
            mass = launch_tile_mass(q, k[:, 71:], lse, torch.tensor(tiles), C**-0.5, True, config)
        if dtype == torch.float32:
            truth = attention_mass_reference(q.double(), k.double(), (71, 200), C**-0.5, tiles=tiles).mean(1)
            torch.testing.assert_close(mass.double(), truth, rtol=2e-5, atol=1e-8)
        else:
            check(mass, q, k, (71, 200), C**-0.5, tiles)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 36), min_size=1, max_size=5),
    keys=st.integers(6, 50),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    reduce_heads=st.booleans(),
    masked=st.booleans(),
)
def test_any_tiles(sizes: list[int], keys: int, dtype: torch.dtype, reduce_heads: bool, masked: bool) -> None:
    tiles = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    q, k = draw(tiles[-1], keys, dtype=dtype, batch=2)
    mask = torch.arange(2 * keys).view(2, keys) % 3 != 1 if masked else None
    start = keys // 3
    scores = torch.einsum("bnhc,bshc->bhns", q.double(), k.double()) * 0.2
    lse = (scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)).logsumexp(-1).float()
    some = None if mask is None else mask[:, start:].contiguous()
    with Canaries():
        mass = launch_tile_mass(q, k[:, start:], lse, torch.tensor(tiles), 0.2, reduce_heads, SMALL, some)
    check(mass, q, k, (start, keys), 0.2, tiles, key_mask=mask)
    through_op = attention_mass(
        q, k, (start, keys), scale=0.2, key_mask=mask, tiles=torch.tensor(tiles), reduce_heads=reduce_heads,
        backend="triton",
    )  # fmt: skip
    check(through_op, q, k, (start, keys), 0.2, tiles, key_mask=mask)


def test_more_tiles_than_one_look_at_them_takes() -> None:
    """A program finds its first tile among 256 at a time."""
    q, k = draw(300, 20, heads=1)
    tiles = sorted([0, 0, 0, *range(0, 301), 300])
    check(
        attention_mass(q, k, (4, 20), scale=0.2, tiles=torch.tensor(tiles), backend="triton"), q, k, (4, 20), 0.2, tiles
    )


def test_masked_keys_and_queries_without_keys_give_nothing() -> None:
    q, k = draw(40, 55, batch=2)
    mask = torch.rand(2, 55, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[1] = False
    k = torch.where(mask[..., None, None], k, torch.full_like(k, 50.0))  # a masked key would win
    tiles = torch.tensor(TILINGS["ragged"])
    lse = torch.einsum("bnhc,bshc->bhns", q.double(), k.double()) * 0.2
    lse = lse.masked_fill(~mask[:, None, None], -torch.inf).logsumexp(-1).float()
    for given_lse in (None, lse):
        mass = attention_mass(q, k, (30, 55), scale=0.2, key_mask=mask, lse=given_lse, tiles=tiles, backend="triton")
        assert not mass[1].any()
        assert not mass.transpose(1, 3)[~mask[:, 30:]].any()
        check(mass, q, k, (30, 55), 0.2, TILINGS["ragged"], key_mask=mask)


def test_one_tile_is_the_pooled_mass_and_an_item_does_not_depend_on_its_neighbours() -> None:
    q, k = draw(40, 55, batch=2)
    pooled = attention_mass(q, k, (20, 55), scale=0.2, backend="triton")
    tiles = torch.tensor([0, 40])
    mass = attention_mass(q, k, (20, 55), scale=0.2, tiles=tiles, backend="triton")
    torch.testing.assert_close(mass[:, :, 0], pooled, rtol=1e-5, atol=1e-8)
    assert torch.equal(attention_mass(q[1:], k[1:], (20, 55), scale=0.2, tiles=tiles, backend="triton"), mass[1:])


def test_rows_far_apart_need_int64_offsets() -> None:
    """3 rows, or heads, 2**30 elements apart: virtual memory, hardly any of it touched."""
    flat = torch.empty(2 * 2**30 + 128, dtype=torch.float16)
    tiles = [0, 1, 3]
    for heads, strides in ((1, (2**31, 2**30, 32, 1)), (3, (2**31, 32, 2**30, 1))):
        far = flat.as_strided((1, 3, heads, 32), strides)
        q, k = draw(3, 3, heads=heads)
        lse = lse_of(q.double(), k.double(), 0.2).float()
        far.copy_(k)
        check(launch_tile_mass(q, far, lse, torch.tensor(tiles), 0.2, True, SMALL), q, k, (0, 3), 0.2, tiles)
        far.copy_(q)
        check(launch_tile_mass(far, k, lse, torch.tensor(tiles), 0.2, True, SMALL), q, k, (0, 3), 0.2, tiles)


def test_wrong_offsets_read_and_write_nothing_outside() -> None:
    """On a card nobody reads the offsets: what they say may be wrong, and must not be more than that."""
    q, k = draw(40, 55)
    lse = lse_of(q.double(), k.double(), 0.2).float()
    for wrong in ([0, 20, 4000], [-50, 3, 40], [5, 20], [30, 10, 40], [0, 2**40], [-(2**40), 40]):
        with Canaries():
            mass = launch_tile_mass(q, k, lse, torch.tensor(wrong), 0.2, True, SMALL)
        assert mass.shape == (1, len(wrong) - 1, 55)


def test_the_trial_of_a_verdict_finds_it_right() -> None:
    q, k = draw(40, 55, C=64)
    for given_lse in (False, True):
        kind = kind_of(q, k, 35, given_lse, tiled=True)
        for name, actual, truth, low in small(kind)("triton"):
            assert_as_accurate(actual, truth, low, name)
    assert kind.form in {usual.form for usual in usual_kinds(torch.device("cuda"))}
