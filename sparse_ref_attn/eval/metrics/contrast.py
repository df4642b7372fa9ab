"""Whether scenery that was left open was drawn, or washed out: how far its colours lie apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from .base import as_image

__all__ = ["SceneryContrast"]


class SceneryContrast:
    """Root mean square distance of the scenery's colours to their mean, over pixels and channels, from 0 to 0.5.

    0 of one colour; of two that cover as much, half of their distance a channel. A mean of many right answers has
    little, where each of them has much: so it tells what `SceneryPsnr` cannot, to which a flat grey is nearer than a
    texture that is drawn wrongly.

    Parameters
    ----------
    hidden : ndarray of bool, shape (H, W)
        Pixels that do not count: the subjects', with a margin.

    Raises
    ------
    ConfigError
        If no pixel counts.

    Examples
    --------
    >>> halves = np.zeros((4, 4, 3)); halves[:2] = 1
    >>> SceneryContrast(np.zeros((4, 4), bool))(halves)
    0.5
    """

    name = "scenery contrast"

    def __init__(self, hidden: NDArray[np.bool_]) -> None:
        self._counts = ~hidden
        if not self._counts.any():
            raise ConfigError("scenery must have a pixel that counts, got all hidden")

    def __call__(self, image: Any) -> float:
        """Of a picture, (H, W, 3) or (3, H, W) from 0 to 1 or a PIL image."""
        colours = as_image(image).movedim(0, -1).double().numpy()[self._counts]
        return float(np.sqrt(np.mean((colours - colours.mean(0)) ** 2)))
