"""Deterministic pictures and random streams for the tests."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch


def picture(width: int = 64, height: int = 64, seed: int = 0) -> PIL.Image.Image:
    """A smooth gradient with a disc and a bar, their places and colours drawn from `seed`."""
    return _picture(width, height, seed).copy()


@lru_cache(maxsize=32)
def _picture(width: int, height: int, seed: int) -> PIL.Image.Image:
    random = np.random.default_rng(seed)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    slope = random.uniform(-3, 3, (2, 3))
    ramp = 0.5 + 0.5 * np.sin(x * slope[0] + y * slope[1] + random.uniform(0, 6, 3))
    image = PIL.Image.fromarray((255 * ramp).astype(np.uint8))
    draw = PIL.ImageDraw.Draw(image)
    for shape, wide, high in ((draw.ellipse, 0.35, 0.35), (draw.rectangle, 0.15, 0.5)):
        left, top = random.uniform(0, 0.6, 2) * (width, height)
        colour = tuple(int(level) for level in random.integers(0, 256, 3))
        shape([left, top, left + wide * width, top + high * height], fill=colour)
    return image


def mask(width: int, height: int) -> PIL.Image.Image:
    """White where inpainting repaints: a centred box of half the side."""
    image = PIL.Image.new("L", (width, height), 0)
    box = [width // 4, height // 4, 3 * width // 4 - 1, 3 * height // 4 - 1]
    PIL.ImageDraw.Draw(image).rectangle(box, fill=255)
    return image


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator at `seed`."""
    return torch.Generator("cpu").manual_seed(seed)
