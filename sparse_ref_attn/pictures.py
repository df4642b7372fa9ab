"""The one way to open a picture: upright, in one mode, and what cannot be read is an error in words."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from .errors import ConfigError

__all__ = ["check_image", "open_image"]


def open_image(path: str | os.PathLike[str], mode: str = "RGB") -> Any:
    """An image file as a ``PIL.Image.Image`` that stands upright: turned as its EXIF orientation says.

    Parameters
    ----------
    path : str or path
    mode : str
        Of Pillow: "RGB", "RGBA", "L".

    Raises
    ------
    ConfigError
        If it cannot be read.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert(mode)


def check_image(path: str | os.PathLike[str]) -> None:
    """Raise as `open_image` where the file is no picture, without decoding it."""
    with _opened(path):
        pass


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise ConfigError(f"an image must be a file, got {path}, which does not exist") from error
    except UnidentifiedImageError as error:
        raise ConfigError(f"an image must be in a format that Pillow reads, got {path}") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"an image must be a readable file, got {path}: {error}") from error
