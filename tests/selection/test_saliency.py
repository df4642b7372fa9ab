"""Saliency against the formula written out, Lab against scikit-image, and scenes with a known subject."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_ref_attn.errors import ConfigError, PixelsUnavailableError
from sparse_ref_attn.selection import Random, Saliency, saliency_map
from sparse_ref_attn.selection.cells import area_pool
from sparse_ref_attn.selection.colour import lab

from .scenes import disc, recall, references


def test_lab_agrees_with_scikit_image():
    color = pytest.importorskip("skimage.color")
    image = np.random.default_rng(0).random((17, 9, 3))
    ours = lab(torch.from_numpy(image).permute(2, 0, 1) * 2 - 1)
    torch.testing.assert_close(ours.permute(1, 2, 0), torch.from_numpy(color.rgb2lab(image)), atol=2e-2, rtol=0)


@pytest.mark.parametrize("shape", [(12, 9), (7, 16), (1, 5), (1, 1)])
def test_map_is_the_formula(shape):
    ndimage = pytest.importorskip("scipy.ndimage")
    height, width = shape
    image = np.random.default_rng(1).random((3, height, width))
    taps = np.array([1, 4, 6, 4, 1]) / 16
    smooth = ndimage.convolve1d(ndimage.convolve1d(image, taps, axis=1, mode="nearest"), taps, axis=2, mode="nearest")
    truth = np.zeros(shape)
    for y in range(height):
        for x in range(width):
            dy, dx = min(y, height - 1 - y), min(x, width - 1 - x)
            mean = image[:, y - dy : y + dy + 1, x - dx : x + dx + 1].mean((1, 2))
            truth[y, x] = np.linalg.norm(mean - smooth[:, y, x])
    torch.testing.assert_close(saliency_map(torch.from_numpy(image)[None])[0], torch.from_numpy(truth))


@pytest.mark.parametrize("grid", [(16, 16), (11, 26)])
def test_finds_the_disc(grid):
    pixels, inside = disc(grid)
    subject = area_pool(inside.float(), grid) > 0.5
    found = recall(Saliency().score(references([grid], pixels=[pixels]))[0], subject)
    chance = recall(Random().score(references([grid]))[0], subject)
    assert found >= 0.95
    assert found >= chance + 0.4


def test_finds_the_cup_in_a_photo():
    """Cup and saucer fill this box of the photo; half the photo's tokens are in it, most of the kept ones are."""
    data = pytest.importorskip("skimage.data")
    photo = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None].float() / 127.5 - 1
    score = Saliency().score(references([(25, 38)], pixels=[photo]))[0]
    cup = torch.zeros(25, 38)
    cup[1:24, 5:31] = 1
    assert cup.flatten()[score.topk(len(score) // 4).indices].mean() >= cup.mean() + 0.2


def test_batch_sizes_and_one_token():
    pixels = [torch.cat([disc((4, 7), seed=s)[0] for s in (0, 1)]), torch.zeros(1, 3, 16, 16)]
    scores = Saliency().score(references([(4, 7), (1, 1)], batch=2, pixels=pixels))
    apart = [Saliency().score(references([(4, 7)], pixels=[p[None]]))[0] for p in pixels[0]]
    torch.testing.assert_close(scores[0], (apart[0] + apart[1]) / 2)
    assert scores[1].tolist() == [0.0]


def test_latents_are_refused_or_used():
    refs = references([(8, 8)], tokens=torch.zeros(1, 64, 12))
    refs.tokens[:, 27] = 1.0
    with pytest.raises(PixelsUnavailableError):
        Saliency().score(refs)
    assert Saliency(on_latents="use").score(refs)[0].argmax() == 27
    with pytest.raises(ConfigError, match="on_latents"):
        Saliency(on_latents="ignore")


def test_nan_is_not_hidden():
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[0, 1, 9, 9] = torch.nan
    assert Saliency().score(references([(2, 2)], pixels=[pixels]))[0].isnan().any()
