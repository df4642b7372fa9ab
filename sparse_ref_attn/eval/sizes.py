"""The size of a picture that nobody, or half, says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters.classes import load_class
from .checked_arguments import check_class

__all__ = ["size_of"]


def size_of(
    pipe: Any, images: Sequence[Any], width: int | None, height: int | None, more: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Height and width: as given, one of them in the shape of the reference, or None where the pipeline keeps it.

    FLUX.1 Kontext alone would make a square of every reference: it gets the reference's shape at its own area.

    Parameters
    ----------
    pipe : diffusers pipeline
    images : sequence of PIL.Image.Image
        The references, of which the pipeline's facts say which one gives the shape.
    width, height : int, optional
        In pixels.
    more : mapping
        Further arguments of the call, which may say the area.
    """
    if width and height:
        return height, width
    cell, facts = 2 * getattr(pipe, "vae_scale_factor", 8), check_class(pipe)
    image = images[facts.shaped_by]
    ratio = image.width / image.height
    if width or height:
        sides = height or (width or 0) / ratio, width or (height or 0) * ratio
        rounded = (max(cell, round(side / cell) * cell) for side in sides)
        return tuple(given or side for given, side in zip((height, width), rounded, strict=True))  # type: ignore[return-value]
    if facts.area is None or facts.area in more:
        return None
    area = inspect.signature(load_class(facts.cls).__call__).parameters[facts.area].default
    high, wide = (int((area * shape) ** 0.5) // cell * cell for shape in (1 / ratio, ratio))
    return max(cell, high), max(cell, wide)
