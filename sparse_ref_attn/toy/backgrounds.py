"""Backgrounds: patterns that a prompt can name, and scenery that it cannot: crops of photographs, made-up clutter."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import VersionError
from .words import COLOURS, PATTERNS

__all__ = ["pattern", "scenery"]

# Sample images that scikit-image ships: CC0 or public domain (its data/README.txt).
_PHOTOS = {
    "train": ("astronaut", "chelsea", "rocket", "retina", "hubble_deep_field"),
    "held-out": ("coffee", "immunohistochemistry"),
}

Picture = NDArray[np.floating[Any]]


def pattern(kind: str, first: str, second: str, side: int) -> Picture:
    """Two colours in one of ``PATTERNS``: (side, side, 3), 0 to 1. Stripes and dots are 8 pixels wide."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    rows, columns = (y // 8) % 2, (x // 8) % 2
    mix = {
        "solid": np.zeros_like(x),
        "rows": rows,
        "columns": columns,
        "dots": ((x % 16 - 7.5) ** 2 + (y % 16 - 7.5) ** 2 < 20).astype(np.float32),
        "fade": y / (side - 1),
    }[kind][..., None]
    a, b = (np.array(COLOURS[name], np.float32) / 255 for name in (first, second))
    return (a * (1 - mix) + b * mix).astype(np.float32)


def random_pattern(rng: np.random.Generator, side: int) -> tuple[Picture, list[str]]:
    """A pattern and the words that name it."""
    kind = PATTERNS[rng.integers(len(PATTERNS))]
    first, second = (list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
    return pattern(kind, first, second, side), [kind, first, f"to-{second}"]


def scenery(rng: np.random.Generator, side: int, split: str) -> Picture:
    """Half of the time a crop of a photograph, else a colour field with clutter: (side, side, 3), 0 to 1."""
    from PIL import Image, ImageDraw

    if rng.random() < 0.5:
        photo = _photos(split)[rng.integers(len(_PHOTOS[split]))]
        size = int(rng.integers(side, min(photo.shape[:2]) + 1))
        top, left = (int(rng.integers(edge - size + 1)) for edge in photo.shape[:2])
        crop = Image.fromarray(photo[top : top + size, left : left + size])
        picture = np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0))
        return picture[:, :: 1 if rng.random() < 0.5 else -1].astype(np.float32) / 255
    cells = int(rng.integers(1, 7))
    field = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    field = field.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(field)
    for _ in range(int(rng.integers(0, 10))):
        x, y = (int(v) for v in rng.integers(0, side, 2))
        w, h = (int(v) for v in rng.integers(side // 32, side // 5, 2))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x - w, y - h, x + w, y + h), fill=colour)
    return np.asarray(field).astype(np.float32) / 255


@lru_cache(maxsize=2)
def _photos(split: str) -> tuple[NDArray[np.uint8], ...]:
    try:
        from skimage import data
    except ImportError as error:
        raise VersionError("the task's photographs need scikit-image: pip install 'sparse-ref-attn[eval]'") from error
    return tuple(np.ascontiguousarray(getattr(data, name)()[..., :3]) for name in _PHOTOS[split])
