"""The one way to open a picture: upright, in one mode and range, and what cannot be read is an error in words."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from .errors import ConfigError

__all__ = ["check_image", "notes_of", "open_image"]

logger = logging.getLogger("sparse_ref_attn")

_OF_SIXTEEN_BITS = ("PNG", "PPM")  # the formats whose 16-bit grey Pillow may open as 32-bit whole numbers
_SEVERAL_IN_ONE = ("MPO",)  # a camera's JPEG with previews behind the picture


def open_image(path: str | os.PathLike[str], mode: str = "RGB") -> Any:
    """An image file as a ``PIL.Image.Image`` that stands upright: turned as its EXIF orientation says.

    Transparent parts are put on white, and a warning says so. Grey values of 16 bits become 8 bits by their range, and
    floating ones, which must lie in [0, 1], too.

    Parameters
    ----------
    path : str or path
    mode : {"RGB", "RGBA", "L"}
        Of Pillow. "RGBA" keeps what is transparent, "L" (a mask) must have nothing transparent.

    Raises
    ------
    ConfigError
        If it cannot be read, holds several pictures (an animation, pages), or its values have no known white.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        return _converted(ImageOps.exif_transpose(_eight_bits(image, path)), mode, path)


def check_image(path: str | os.PathLike[str]) -> None:
    """Raise as `open_image` where the file is no single picture, without decoding it."""
    with _opened(path):
        pass


def notes_of(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """A picture's format, and what its file says beside the pixels; "" and nothing of what is no whole picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            notes = {str(name): value for name, value in image.info.items()}
            image.verify()
            return image.format or "", notes
    except (OSError, SyntaxError, ValueError):
        return "", {}


def _eight_bits(image: Any, path: str | os.PathLike[str]) -> Any:
    """The image with values of one byte, its orientation still in its EXIF data."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _OF_SIXTEEN_BITS):
        values = np.asarray(image).astype(np.float64) / 65535
    elif image.mode == "F":
        values = np.asarray(image, np.float64)
        if not (values.size and values.min() >= 0 and values.max() <= 1):
            raise ConfigError(
                f"a picture of floating values must have them in [0, 1], got {path} with {values.min():g} to "
                f"{values.max():g}"
            )
    elif image.mode == "I":
        raise ConfigError(f"a picture must have values of a known white, got {path} with 32-bit whole numbers")
    else:
        return image
    small = Image.fromarray(np.round(255 * values).clip(0, 255).astype(np.uint8))
    small.info["exif"] = image.getexif().tobytes()
    return small


def _converted(image: Any, mode: str, path: str | os.PathLike[str]) -> Any:
    from PIL import Image

    if mode == "RGBA" or not image.has_transparency_data:
        return image.convert(mode)
    layered = image.convert("RGBA")
    if layered.getextrema()[3][0] < 255:
        if mode == "L":
            raise ConfigError(f"a mask must be opaque, because a transparent part is neither in nor out, got {path}")
        logger.warning("%s: its transparent parts are put on white", path)
        layered = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    return layered.convert(mode)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format not in _SEVERAL_IN_ONE:
                raise ConfigError(
                    f"an image must be one picture, got {path} with {frames} of them: save the one that is meant"
                )
            yield image
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"an image must be a file, got {path}, which does not exist") from error
    except UnidentifiedImageError as error:
        raise ConfigError(f"an image must be in a format that Pillow reads, got {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"an image must be a readable file, got {path}: {error}") from error
