"""Text and pictures set on a page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..errors import ConfigError
from ..files import replacing

if TYPE_CHECKING:
    from PIL import Image, ImageFont

__all__ = [
    "FAINT",
    "GAP",
    "INK",
    "MARGIN",
    "PAPER",
    "WIDTH",
    "across",
    "down",
    "page",
    "percent",
    "save",
    "typeface",
    "words",
]

WIDTH, MARGIN, GAP = 1400, 40, 24  # pixels
PAPER, INK, FAINT = (255, 255, 255), (34, 38, 46), (118, 124, 134)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}


def typeface(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def words(text: str, size: int, width: int = WIDTH, colour: tuple[int, int, int] = INK) -> Image.Image:
    """Text on paper, wrapped between words to `width` pixels."""
    from PIL import Image, ImageDraw

    font = typeface(size)
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    high = round(1.3 * size)
    image = Image.new("RGB", (math.ceil(max(font.getlength(line) for line in lines)), high * len(lines)), PAPER)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((0, i * high + high / 2), line, colour, font, anchor="lm")
    return image


def down(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Images one below another, flush left."""
    from PIL import Image

    height = sum(image.height for image in images) + gap * (len(images) - 1)
    out = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    y = 0
    for image in images:
        out.paste(image, (0, y))
        y += image.height + gap
    return out


def across(images: Sequence[Image.Image], gap: int, width: int | None = None) -> Image.Image:
    """Images side by side, each `width` wide if given; small ones (a legend) stand centred in height."""
    from PIL import Image

    widths = [width or i.width for i in images]
    height = max(i.height for i in images)
    out = Image.new("RGB", (sum(widths) + gap * (len(images) - 1), height), PAPER)
    x = 0
    for image, wide in zip(images, widths, strict=True):
        out.paste(image, (x, 0 if width else (height - image.height) // 2))
        x += wide + gap
    return out


def page(content: Image.Image) -> Image.Image:
    """The content with a margin around it, `WIDTH` wide."""
    from PIL import Image

    out = Image.new("RGB", (WIDTH, content.height + 2 * MARGIN), PAPER)
    out.paste(content, (MARGIN, MARGIN))
    return out


def save(image: Image.Image, path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write in the format that the name ends in; a name without an ending, or a file, gets a PNG."""
    if not isinstance(path, (str, os.PathLike)):
        image.save(path, format="PNG")
        return
    suffix = Path(path).suffix.lower()
    if suffix and suffix not in FORMATS:
        raise ConfigError(f"a picture's name must end in {', '.join(FORMATS)}, got {os.fspath(path)}")
    with replacing(path) as draft:
        image.save(draft, format=FORMATS.get(suffix, "PNG"))


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"
