"""What pixel selectors see: grey levels, CIE Lab, latents scaled to an image's range."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import References

__all__ = ["grey", "is_pixels", "lab", "unit_range"]


def is_pixels(references: References, i: int) -> bool:
    """Whether reference `i` came as pixels (else ``image`` falls back to latents or refuses)."""
    return i < len(references.pixels) and references.pixels[i] is not None


def grey(image: Tensor) -> Tensor:
    """Luma (ITU-R BT.709) of RGB in [-1, 1]: (b, 3, H, W) -> (b, 1, H, W) in [0, 1].

    Examples
    --------
    >>> grey(-torch.ones(1, 3, 1, 1)).item()
    0.0
    """
    weights = image.new_tensor([0.2125, 0.7154, 0.0721])[:, None, None]
    return ((image * 0.5 + 0.5) * weights).sum(-3, keepdim=True)


def lab(image: Tensor) -> Tensor:
    """CIE L*a*b* (D65, 2 degrees) of sRGB in [-1, 1], (..., 3, H, W) to the same shape.

    L runs from 0 to 100, a and b from about -110 to 110.

    References
    ----------
    IEC 61966-2-1 (sRGB); CIE 15:2004 (L*a*b*).

    Examples
    --------
    >>> lab(torch.ones(3, 1, 1)).flatten().round().abs().tolist()
    [100.0, 0.0, 0.0]
    """
    value = (image * 0.5 + 0.5).clamp(0, 1)
    linear = torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = image.new_tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    white = image.new_tensor([0.95047, 1.0, 1.08883])
    xyz = (linear.movedim(-3, -1).unsqueeze(-2) * (to_xyz / white[:, None])).sum(-1)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def unit_range(image: Tensor) -> Tensor:
    """Each item of (b, channels, H, W) scaled so that its smallest value is 0 and its largest 1.

    Examples
    --------
    >>> unit_range(torch.tensor([[[[-3.0, 1.0]]]])).flatten().tolist()
    [0.0, 1.0]
    """
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    return (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
