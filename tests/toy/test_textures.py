"""Scenery that is left open: two colours, four kinds, and a mean that is none of them."""

from collections import Counter

import numpy as np
import pytest

from sparse_ref_attn.toy.textures import KINDS, PAIRS, PALETTE, PERIODS, Texture, mix, random_texture, turns


def drawn(count, side=64):
    return [random_texture(np.random.default_rng((4, i)), side) for i in range(count)]


@pytest.mark.parametrize("texture", drawn(24), ids=lambda texture: texture.kind)
def test_two_colours_share_the_picture(texture):
    """All pixels but those of edges have one of the two, each of them about half of the picture."""
    picture = texture.picture(128)
    assert picture.dtype == np.float32
    shares = [np.isclose(picture, PALETTE[i], atol=1e-5).all(-1).mean() for i in (texture.first, texture.second)]
    assert sum(shares) > 0.75
    assert min(shares) > 0.25


def test_every_kind_and_pair_of_colours_comes():
    many = drawn(800)
    kinds, pairs = (Counter(found) for found in zip(*((t.kind, (t.first, t.second)) for t in many), strict=True))
    assert all(150 < kinds[kind] < 250 for kind in KINDS)
    assert set(pairs) == {tuple(pair) for pair in PAIRS.tolist()}
    for texture in many:
        low, high = PERIODS[texture.kind]
        assert low <= texture.period <= high
        assert np.square(PALETTE[texture.first] - PALETTE[texture.second]).mean() > 0.3**2


@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_repeats(kind):
    """After its period along its own direction, and after the turn that is said to, but for the colours' order."""
    angle, period, x, y = 0.4, 24.0, 30.0, 40.0
    first = mix(kind, [angle, period, x, y], 64)
    turned = mix(kind, [angle + turns(kind), period, x, y], 64)
    assert np.allclose(turned, first, atol=0.02) or np.allclose(turned, 1 - first, atol=0.02)
    if kind == "rings":
        distance = np.hypot(*(np.mgrid[:64, :64] - np.array([y, x])[:, None, None]))
        same = np.isclose(distance % period, period / 2, atol=3)
        assert same.sum() > 500
        assert not first[same].any()
    else:
        moved = mix(kind, [angle, period, x + period * np.cos(angle), y + period * np.sin(angle)], 64)
        assert np.allclose(moved, first, atol=0.02)
    assert not np.allclose(mix(kind, [angle, period, x + 5, y + 5], 64), first, atol=0.02)


def test_several_maps_at_once_are_those_of_each():
    settings = np.array([[0.1, 24, 3, 4], [0.7, 30, 50, 9]], np.float32)
    for kind in KINDS:
        both = mix(kind, settings, 64, 2)
        assert both.shape == (2, 32, 32)
        assert all(np.array_equal(one, mix(kind, s, 64, 2)) for one, s in zip(both, settings, strict=True))


def test_the_mean_is_none_of_them():
    pictures = np.stack([texture.picture(64) for texture in drawn(256)])
    assert pictures.mean(0).std() < 0.3 * np.mean([picture.std() for picture in pictures])


def test_a_texture_is_its_numbers():
    texture = Texture("checks", 0.0, 32.0, 0.0, 0.0, 7, 8)
    assert np.allclose(texture.picture(64)[:16, :16][2:-2, 2:-2], PALETTE[7], atol=1e-5)
    assert np.allclose(texture.picture(64)[:16, 16:32][2:-2, 2:-2], PALETTE[8], atol=1e-5)
