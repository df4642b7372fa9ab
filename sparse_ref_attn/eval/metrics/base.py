"""What a metric is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["Metric", "as_image", "check_pair"]


class Metric:
    """A number for two images of one size.

    Attributes
    ----------
    name : str
        Of the column, with the model that the number comes from.
    higher_is_better : bool
    """

    name: str
    higher_is_better: bool

    def __call__(self, image: Any, other: Any) -> float:
        """Compare an image with what it should be.

        Parameters
        ----------
        image, other : PIL image, array (H, W, 3) uint8 or float in [0, 1], or tensor (3, H, W) in [0, 1]

        Raises
        ------
        ConfigError
            For images of different sizes, or values outside [0, 1].
        """
        raise NotImplementedError


def as_image(image: Any) -> Tensor:
    """Any of the forms that `Metric` takes -> (3, H, W) float32 in [0, 1].

    Examples
    --------
    >>> as_image(np.full((4, 6, 3), 255, np.uint8)).shape
    torch.Size([3, 4, 6])
    """
    if isinstance(image, Tensor):
        x = image.detach().cpu()
    else:
        if hasattr(image, "convert"):
            image = image.convert("RGB")
        x = torch.from_numpy(np.array(image))
        x = x.movedim(-1, 0) if x.ndim == 3 else x
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if x.ndim != 3 or x.shape[0] != 3:
        raise ConfigError(f"an image must be (H, W, 3), or a tensor (3, H, W), got {tuple(x.shape)}")
    if not (x.isfinite().all() and x.min() >= 0 and x.max() <= 1):
        raise ConfigError(f"an image's values must lie in [0, 1], got {float(x.min()):.3g} to {float(x.max()):.3g}")
    return x


def check_pair(image: Any, other: Any) -> tuple[Tensor, Tensor]:
    """Both as `as_image`; raises ConfigError if their sizes differ."""
    a, b = as_image(image), as_image(other)
    if a.shape != b.shape:
        raise ConfigError(
            f"images that are compared must have one size, got {a.shape[1]} x {a.shape[2]} and "
            f"{b.shape[1]} x {b.shape[2]}"
        )
    return a, b
