"""Saliency from colour contrast: keep what stands out from its surround."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..checks import is_one_of
from ..errors import ConfigError
from .base import References, Selector
from .cells import area_pool
from .colour import is_pixels, lab

__all__ = ["Saliency", "saliency_map"]


@dataclass(frozen=True)
class Saliency(Selector):
    """Score a token by the mean saliency of its cell; see `saliency_map` for the equation.

    Needs no training and no weights. Finds compact objects that differ in colour from what lies around
    them and do not touch the border; textured scenes and objects cut by the frame it ranks poorly.

    Parameters
    ----------
    on_latents : {"error", "use"}
        What to do with a reference given as latents: refuse, or take the latent channels in place of
        L*, a*, b*.

    Raises
    ------
    ConfigError
        If `on_latents` is neither.
    PixelsUnavailableError
        At scoring, if a reference has no pixels and `on_latents` is "error".

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=16, text=0, generation=(0, 0), references=(Reference(0, 16, (4, 4)),))
    >>> photo = torch.zeros(1, 3, 64, 64)
    >>> photo[:, 0, 16:32, 32:48] = 1.0
    >>> Saliency().score(References(layout, torch.zeros(1, 16, 8), pixels=[photo]))[0].argmax().item()
    6
    """

    on_latents: str = "error"

    def __post_init__(self) -> None:
        if not is_one_of(self.on_latents, ("error", "use")):
            raise ConfigError(f"on_latents must be 'error' or 'use', got {self.on_latents!r}")

    def score(self, references: References) -> list[Tensor]:
        scores = []
        for i in range(len(references.sizes)):
            image = references.image(i, self.on_latents)
            features = lab(image) if is_pixels(references, i) else image
            pooled = area_pool(saliency_map(features), references.grid(i)).mean(0)
            scores.append(pooled.float().to(references.tokens.device))
        return scores


def saliency_map(features: Tensor) -> Tensor:
    """Saliency by maximum symmetric surround.

    S(x, y) = || mean of I over the largest rectangle inside the image that is centred on (x, y)
    - (G * I)(x, y) ||, where G is the 5 x 5 binomial filter. Near the border the rectangle is small, so
    background that leaves the image is compared with itself and fades, which the global mean of
    frequency-tuned saliency does not achieve.

    Parameters
    ----------
    features : Tensor, shape (b, channels, H, W), floating
        I; for photographs CIE L*a*b*.

    Returns
    -------
    Tensor, shape (b, H, W)
        Distances in the unit of the features, >= 0.

    Notes
    -----
    Integral images in float64; no host sync.

    References
    ----------
    R. Achanta, S. Susstrunk, Saliency Detection Using Maximum Symmetric Surround, ICIP 2010;
    R. Achanta et al., Frequency-tuned Salient Region Detection, CVPR 2009.

    Examples
    --------
    >>> spot = torch.zeros(1, 1, 9, 9)
    >>> spot[0, 0, 4, 4] = 1.0
    >>> divmod(int(saliency_map(spot).argmax()), 9)
    (4, 4)
    """
    height, width = features.shape[-2:]
    taps = features.new_tensor([1, 4, 6, 4, 1]) / 16
    padded = functional.pad(features, (2, 2, 2, 2), mode="replicate")
    tall = sum(tap * padded[..., i : i + height, :] for i, tap in enumerate(taps))
    smooth = sum(tap * tall[..., i : i + width] for i, tap in enumerate(taps))
    return (_surround(features) - smooth).square().sum(dim=1).sqrt()


def _surround(features: Tensor) -> Tensor:
    """Mean over the largest rectangle around each pixel that lies inside the image."""
    height, width = features.shape[-2:]
    total = functional.pad(features.double(), (1, 0, 1, 0)).cumsum(-1).cumsum(-2)
    y, x = (torch.arange(n, device=features.device) for n in (height, width))
    dy, dx = torch.minimum(y, height - 1 - y), torch.minimum(x, width - 1 - x)
    rows = total[..., y + dy + 1, :] - total[..., y - dy, :]
    sums = rows[..., x + dx + 1] - rows[..., x - dx]
    return (sums / ((2 * dy + 1)[:, None] * (2 * dx + 1))).to(features.dtype)
