"""PSNR, of a picture and of its subject, and SSIM, as scikit-image computes them."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ConfigError
from .base import Metric, check_pair

__all__ = ["MaskedPsnr", "Psnr", "Ssim"]


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
        from skimage.metrics import structural_similarity

        a, b = (x.movedim(0, -1).double().numpy() for x in check_pair(image, other))
        return float(
            structural_similarity(
                a, b, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        )


class MaskedPsnr(Psnr):
    """`Psnr` of the pixels of a subject.

    Parameters
    ----------
    mask : array or tensor, shape (H, W), 0 to 1
        How much each pixel counts; not all 0.

    Raises
    ------
    ConfigError
        If the mask is empty or, when called, not of the images' size.

    Examples
    --------
    >>> mask = torch.zeros(8, 8)
    >>> mask[:4] = 1
    >>> image = torch.zeros(3, 8, 8)
    >>> image[:, :4] = 0.1
    >>> round(MaskedPsnr(mask)(image, torch.zeros(3, 8, 8)), 6)
    20.0
    """

    name = "subject PSNR (dB)"

    def __init__(self, mask: Any) -> None:
        self._mask = torch.as_tensor(mask).double()
        if self._mask.ndim != 2 or not bool(self._mask.sum() > 0):
            raise ConfigError(f"a mask must be (H, W) and mark a pixel, got {tuple(self._mask.shape)}")

    def __call__(self, image: Any, other: Any) -> float:
        a, b = check_pair(image, other)
        if a.shape[1:] != self._mask.shape:
            raise ConfigError(f"a mask must have the images' size, {a.shape[1:]}, got {tuple(self._mask.shape)}")
        error = (a - b).double().square().mean(0)
        return float(-10 * torch.log10((error * self._mask).sum() / self._mask.sum()))
