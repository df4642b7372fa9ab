"""Subjects with exact masks: a folder of transparent pictures, split once into train and held-out by identity."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..pictures import open_image

__all__ = ["SUBJECTS", "Sprites", "held_out", "load_sprites"]

SUBJECTS = str(Path(__file__).parent.parent / "assets" / "toy" / "sprites")
"""Folder of the held-out subjects that ship in the package."""

SIDES = (64, 48, 32, 24)  # pixels; subjects are drawn at these sizes
_HELD_OUT = 10  # per cent of the identities
# Skin tones, men and women, persons, families, the 24 clock faces: several files of one identity.
_VARIANTS = re.compile(r"1f3f[b-f]|200d-264[02]|^1f46[89]|^1f9d1|^1f46[a-e]|^1f48f|^1f491|^1f55[0-9a-f]|^1f56[0-7]$")


class Sprites:
    """Subjects at several sizes.

    Attributes
    ----------
    names : tuple of str
        One per subject.
    pixels : dict of int to ndarray
        Side in pixels to (n, side, side, 4) uint8: red, green, blue times alpha, and alpha.
    """

    def __init__(self, names: tuple[str, ...], pixels: dict[int, NDArray[np.uint8]]) -> None:
        self.names = names
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.names)


def held_out(name: str) -> bool:
    """Whether a subject is never trained on: decided by its name alone, so that adding subjects moves none."""
    return hashlib.sha256(name.encode()).digest()[0] * 100 < _HELD_OUT * 256


@lru_cache(maxsize=4)
def load_sprites(folder: str, split: str) -> Sprites:
    """Read the subjects of one split.

    Parameters
    ----------
    folder : str
        Of PNG or WebP pictures with an alpha channel, one subject each, such as ``SUBJECTS``. Left out are emoji that
        come in variants of one identity (by the code points of the file's name), and pictures that fill too little or
        too much of their square or are of one flat colour.
    split : {"train", "held-out"}
        By a hash of the file's name.

    Returns
    -------
    Sprites

    Raises
    ------
    ConfigError
        If the folder does not exist or has no usable picture, or one cannot be read.
    """
    if split not in ("train", "held-out"):
        raise ConfigError(f"split must be 'train' or 'held-out', got {split!r}")
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"the folder of sprites must exist, got {folder}")
    paths = sorted(p for p in root.iterdir() if p.suffix in (".png", ".webp") and not _VARIANTS.search(p.stem))
    found = {}
    for path in paths:
        if held_out(path.stem) == (split == "held-out"):
            sprite = _read(path)
            if sprite is not None:
                found[path.stem] = sprite
    if not found:
        raise ConfigError(f"{folder} must hold PNG or WebP pictures with an alpha channel, got none for {split}")
    pixels = {side: np.stack([sprite[side] for sprite in found.values()]) for side in SIDES}
    return Sprites(tuple(found), pixels)


def _read(path: Path) -> dict[int, NDArray[np.uint8]] | None:
    from PIL import Image

    picture = open_image(path, "RGBA")
    box = picture.getchannel("A").getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    sizes = {}
    for side in SIDES:
        small = np.asarray(square.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS))
        sizes[side] = np.minimum(small, small[..., 3:])  # Lanczos overshoots
    opaque = sizes[24][..., 3] > 127
    rgb = sizes[24][..., :3][opaque]
    if not 0.3 < opaque.mean() < 0.95 or rgb.std(0).mean() < 18:
        return None
    return sizes
