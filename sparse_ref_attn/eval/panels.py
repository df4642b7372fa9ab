"""Pictures side by side, each under its name and above what it cost or lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..overlay.canvas import FAINT, GAP, PAPER, across, down, words

__all__ = ["SIDE", "Panel", "panels"]

SIDE = 320
"""Pixels of a picture's longer side."""


@dataclass(frozen=True)
class Panel:
    """One picture of a row.

    Parameters
    ----------
    name : str
        Above it.
    picture : PIL.Image.Image
    lines : tuple of str
        Below it, one short fact a line.
    """

    name: str
    picture: Any
    lines: tuple[str, ...] = ()


def panels(row: Sequence[Panel]) -> Any:
    """The pictures side by side on white, scaled to `SIDE` pixels on the longer side.

    Parameters
    ----------
    row : sequence of Panel
        At least one.

    Returns
    -------
    PIL.Image.Image
        RGB; a margin of white all round.

    Examples
    --------
    >>> from PIL import Image
    >>> shown = panels([Panel("dense", Image.new("RGB", (64, 32), "red"), ("all 16 tokens",))])
    >>> shown.width, shown.getpixel((180, 120))
    (368, (255, 0, 0))
    """
    from PIL import Image

    columns = []
    for each in row:
        below = [words(line, 24, SIDE, FAINT) for line in each.lines]
        columns.append(down([words(each.name, 30, SIDE), _fitted(each.picture), *below], 8))
    shown = across(columns, GAP, SIDE)
    out = Image.new("RGB", (shown.width + 2 * GAP, shown.height + 2 * GAP), PAPER)
    out.paste(shown, (GAP, GAP))
    return out


def _fitted(picture: Any) -> Any:
    from PIL import Image

    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(scale * edge)) for edge in picture.size)
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
