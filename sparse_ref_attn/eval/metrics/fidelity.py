"""PSNR and SSIM, as scikit-image computes them."""

from __future__ import annotations

from typing import Any

import torch
from skimage.metrics import structural_similarity

from .base import Metric, check_pair

__all__ = ["Psnr", "Ssim"]


class Psnr(Metric):
    """Peak signal-to-noise ratio in dB of values in [0, 1]; infinite for equal images.

    Examples
    --------
    >>> round(Psnr()(torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.1)), 6)
    20.0
    """

    name = "PSNR (dB)"
    higher_is_better = True

    def __call__(self, image: Any, other: Any) -> float:
        a, b = check_pair(image, other)
        return float(-10 * torch.log10((a - b).double().square().mean()))


class Ssim(Metric):
    """Structural similarity (Wang et al. 2004): Gaussian window of sigma 1.5, mean of the channels.

    The shorter side must have at least 11 pixels.
    """

    name = "SSIM"
    higher_is_better = True

    def __call__(self, image: Any, other: Any) -> float:
        a, b = (x.movedim(0, -1).double().numpy() for x in check_pair(image, other))
        return float(
            structural_similarity(
                a, b, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        )
