"""Canny against scikit-image, and the selector on scenes with a known subject."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_ref_attn.errors import ConfigError, PixelsUnavailableError
from sparse_ref_attn.selection import Edges, Random, canny
from sparse_ref_attn.selection.cells import area_pool

from .scenes import disc, recall, references

skimage = pytest.importorskip("skimage")
from skimage import color, data, feature  # noqa: E402

PHOTOS = ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")


@pytest.fixture(scope="module", params=PHOTOS)
def photo(request):
    """Grey levels in [0, 1], float64, at half size."""
    image = getattr(data, request.param)()[::2, ::2]
    return color.rgb2gray(image) if image.ndim == 3 else image / 255.0


@pytest.mark.parametrize(("sigma", "low", "high"), [(1.0, 0.1, 0.2), (2.0, 0.05, 0.3), (0.7, 0.4, 0.8)])
def test_canny_agrees_with_scikit_image(photo, sigma, low, high):
    ours = canny(torch.from_numpy(photo).float(), sigma, low, high).numpy()
    theirs = feature.canny(photo, sigma, low, high)
    assert 0.001 < theirs.mean() < 0.5
    assert (ours == theirs).mean() >= 0.999
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) >= 0.99


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 3), (31, 5), (63, 129)])
def test_canny_on_odd_sizes(shape):
    image = np.random.default_rng(0).random(shape)
    ours = canny(torch.from_numpy(image), 0.6, 0.3, 0.6).numpy()
    assert (ours == feature.canny(image, 0.6, 0.3, 0.6)).mean() >= 0.99
    assert ours.shape == shape


def test_hysteresis_follows_a_weak_edge_any_distance():
    """A step that fades from strong to weak stays one edge to its end; without the strong part it vanishes."""
    height = torch.linspace(1.0, 0.05, 300)
    image = torch.zeros(300, 21)
    image[:, 10], image[:, 11:] = height / 2, height[:, None]
    both = canny(image, 1.0, 0.1, 1.0)
    assert both[1:-1, 10].all()
    assert not canny(image[200:], 1.0, 0.1, 1.0).any()


def test_several_channels_take_the_steepest():
    image = torch.zeros(3, 32, 32)
    image[1, :, 15], image[1, :, 16:] = 0.5, 1.0
    assert torch.equal(canny(image, 1.0), canny(image[1], 1.0))
    assert canny(image, 1.0).any()


@pytest.mark.parametrize("grid", [(16, 16), (9, 23)])
def test_finds_the_textured_disc(grid):
    pixels, inside = disc(grid)
    subject = area_pool(inside.float(), grid) > 0.5
    found = recall(Edges().score(references([grid], pixels=[pixels]))[0], subject)
    chance = recall(Random().score(references([grid]))[0], subject)
    assert found >= 0.95
    assert found >= chance + 0.4


def test_score_is_edge_density_first():
    """Ordering by score is ordering by the pooled edge map of scikit-image wherever densities differ."""
    image = data.astronaut()[:256, :320]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    score = Edges(1.0, 0.1, 0.2).score(references([(16, 20)], pixels=[pixels]))[0]
    edges = torch.from_numpy(feature.canny(color.rgb2gray(image), 1.0, 0.1, 0.2)).double()
    density = edges.reshape(16, 16, 20, 16).mean((1, 3)).flatten()
    torch.testing.assert_close(score.double(), density, atol=2e-3, rtol=0)


def test_cells_without_edges_are_ordered_by_gradient_and_flat_ones_tie():
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[..., 32:] += torch.linspace(0, 0.2, 32)
    score = Edges().score(references([(4, 4)], pixels=[pixels]))[0].reshape(4, 4)
    assert (score < 1e-3).all()
    assert (score[:, 3] > score[:, 0]).all()
    assert (score[:, 0] == 0).all()


def test_a_batch_of_different_references_is_averaged():
    first, second = torch.zeros(1, 3, 48, 64), torch.zeros(1, 3, 48, 64)
    first[..., 20:30] = 1.0
    second[..., 25:40, :] = -1.0
    one, two, both = (
        Edges().score(references([(3, 4)], batch=2, pixels=[p]))[0] for p in (first, second, torch.cat([first, second]))
    )
    torch.testing.assert_close(both, (one + two) / 2)


def test_several_references_of_different_sizes():
    grids = [(4, 6), (9, 3), (1, 1)]
    pixels = [disc(grid)[0] for grid in grids]
    together = Edges().score(references(grids, pixels=pixels))
    for grid, image, score in zip(grids, pixels, together, strict=True):
        assert torch.equal(score, Edges().score(references([grid], pixels=[image]))[0])
        assert score.dtype == torch.float32
        assert score.shape == (grid[0] * grid[1],)


def test_latents_are_refused_or_used():
    refs = references([(8, 8)])
    with pytest.raises(PixelsUnavailableError, match="latents"):
        Edges().score(refs)
    refs.tokens = torch.zeros(1, 64, 16)
    refs.tokens[:, [27, 28, 35, 36]] = 3.0
    score = Edges(sigma=0.5, on_latents="use").score(refs)[0].reshape(8, 8)
    assert score[2:6, 2:6].sum() > 0.99 * score.sum() > 0


def test_nan_is_not_hidden():
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[0, 0, 5, 5] = torch.nan
    assert Edges().score(references([(2, 2)], pixels=[pixels]))[0].isnan().any()


@pytest.mark.parametrize(
    "bad", [{"sigma": 0.0}, {"low": 0.0}, {"low": 0.5}, {"high": float("nan")}, {"sigma": float("inf")}]
)
def test_settings_out_of_range(bad):
    with pytest.raises(ConfigError, match="must"):
        Edges(**bad)
    with pytest.raises(ConfigError, match="must"):
        canny(torch.zeros(4, 4), **bad)


def test_bad_choices():
    with pytest.raises(ConfigError, match="on_latents"):
        Edges(on_latents="maybe")
    with pytest.raises(ConfigError, match="floating"):
        canny(torch.zeros(4, 4, dtype=torch.uint8))


def test_a_blur_wider_than_the_image():
    """Its taps outside the image weigh nothing: a sigma of a million pixels took memory for all of them."""
    image = torch.rand(9, 7, generator=torch.Generator().manual_seed(0))
    assert canny(image, 1e12).shape == (9, 7)
