"""Canny edges: keep the tokens whose cells hold the most edge pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..checks import is_number, is_one_of
from ..errors import ConfigError
from .base import References, Selector
from .cells import area_pool
from .colour import grey, is_pixels, unit_range

__all__ = ["Edges", "canny"]

ON_LATENTS = ("error", "use")
STEEPEST = 4 * math.sqrt(2)  # the largest Sobel magnitude an image in [0, 1] can have
FLAT = 1e-5  # below this a gradient is rounding, not image


@dataclass(frozen=True)
class Edges(Selector):
    """Score a token by the Canny edges in its cell.

    score = share of the cell's pixels that are edges + 0.001 * (mean gradient / largest possible gradient).

    The second term only orders cells of equal density, so that cells without an edge still come in a
    sensible order. A batch of different references is averaged after scoring.

    Parameters
    ----------
    sigma : float
        Standard deviation of the Gaussian, in pixels (in tokens, for latents), > 0.
    low, high : float
        Thresholds on the Sobel magnitude of the image in [0, 1] (a clean vertical step of height 1
        has 4 before smoothing), 0 < low <= high. The defaults favour outlines at about one megapixel; finer
        ones (scikit-image's 1.0, 0.1, 0.2) find edges in wood grain and fur wherever one looks.
    on_latents : {"error", "use"}
        What to do with a reference given as latents: refuse, or take the latents, scaled to [0, 1],
        as an image of one pixel a token.

    Raises
    ------
    ConfigError
        If a setting is out of range.
    PixelsUnavailableError
        At scoring, if a reference has no pixels and `on_latents` is "error".

    Notes
    -----
    One host sync a reference, at ranking: the linking of weak edges runs on the CPU.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=16, text=0, generation=(0, 0), references=(Reference(0, 16, (4, 4)),))
    >>> photo = torch.full((1, 3, 64, 64), -1.0)
    >>> photo[..., :, 40:] = 1.0
    >>> Edges().score(References(layout, torch.zeros(1, 16, 8), pixels=[photo]))[0].reshape(4, 4).argmax(1)
    tensor([2, 2, 2, 2])
    """

    sigma: float = 2.0
    low: float = 0.2
    high: float = 0.4
    on_latents: str = "error"

    def __post_init__(self) -> None:
        _check(self.sigma, self.low, self.high)
        if not is_one_of(self.on_latents, ON_LATENTS):
            raise ConfigError(f"on_latents must be one of {ON_LATENTS}, got {self.on_latents!r}")

    def score(self, references: References) -> list[Tensor]:
        return [self._score(references, i) for i in range(len(references.sizes))]

    def _score(self, references: References, i: int) -> Tensor:
        image = references.image(i, self.on_latents)
        image = grey(image) if is_pixels(references, i) else unit_range(image)
        grid = references.grid(i)
        scores = []
        for item in image:
            gradient = _gradient(item, self.sigma)
            magnitude = torch.hypot(*gradient)
            density = area_pool(_link(gradient, self.low, self.high).to(magnitude), grid)
            slope = area_pool(torch.where(magnitude < FLAT, 0.0, magnitude), grid) / STEEPEST
            scores.append(density + 1e-3 * slope)
        return torch.stack(scores).mean(0).to(references.tokens.device)


def canny(image: Tensor, sigma: float = 2.0, low: float = 0.2, high: float = 0.4) -> Tensor:
    """Canny's edges of an image.

    Gaussian smoothing (pixels outside the image weigh nothing), Sobel gradient, suppression of every pixel
    whose magnitude is below that of either neighbour along the gradient (interpolated between the two
    nearest pixels), then hysteresis: a pixel of at least `low` is an edge if a chain of such pixels,
    8-connected, leads to one of at least `high`.

    Parameters
    ----------
    image : Tensor, shape (H, W) or (channels, H, W), float32 or float64
        In [0, 1]. With several channels each pixel takes the gradient of its steepest channel.
    sigma : float
        Standard deviation of the Gaussian in pixels, > 0; it is cut at 4 sigma.
    low, high : float
        Thresholds on the Sobel magnitude, 0 < low <= high.

    Returns
    -------
    Tensor, shape (H, W), bool
        On the image's device. The outermost pixels are never edges.

    Notes
    -----
    Deterministic, not differentiable. One host sync for an image on a GPU: hysteresis is exact and its
    number of rounds depends on the image, so it runs on the CPU.

    References
    ----------
    J. Canny, A Computational Approach to Edge Detection, IEEE PAMI 8(6), 1986.

    Examples
    --------
    >>> image = torch.zeros(9, 9)
    >>> image[:, 4], image[:, 5:] = 0.5, 1.0
    >>> canny(image, sigma=1.0).int()[4].tolist()
    [0, 0, 0, 0, 1, 0, 0, 0, 0]
    """
    _check(sigma, low, high)
    if image.ndim not in (2, 3) or not image.is_floating_point():
        raise ConfigError(
            f"canny's image must be floating, (H, W) or (channels, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    return _link(_gradient(image if image.ndim == 3 else image[None], sigma), low, high)


def _check(sigma: float, low: float, high: float) -> None:
    for name, value in (("sigma", sigma), ("low", low), ("high", high)):
        if not is_number(value):
            raise ConfigError(f"{name} must be a number, got {value!r}")
    if not 0 < sigma < math.inf:
        raise ConfigError(f"sigma must be above 0 pixels and finite, got {sigma}")
    if not 0 < low <= high < math.inf:
        raise ConfigError(f"thresholds must satisfy 0 < low <= high, got low={low}, high={high}")


def _gradient(image: Tensor, sigma: float) -> Tensor:
    """Sobel gradient (down, right) of the smoothed image's steepest channel: (channels, H, W) -> (2, H, W)."""
    radius = int(min(4 * sigma + 0.5, max(image.shape[-2:])))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2).tolist()
    smooth = _blur(_blur(image, taps).transpose(-1, -2), taps).transpose(-1, -2)
    padded = functional.pad(smooth, (1, 1, 1, 1), mode="replicate")
    across = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    along = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    gradient = torch.stack([along[..., 2:, :] - along[..., :-2, :], across[..., 2:] - across[..., :-2]])
    steepest = torch.hypot(*gradient).argmax(0)
    return gradient.gather(1, steepest.expand(2, 1, -1, -1)).squeeze(1)


def _blur(image: Tensor, taps: list[float]) -> Tensor:
    """Weighted mean along the last axis, over the pixels that exist."""
    width, radius = image.shape[-1], len(taps) // 2
    padded = functional.pad(image, (radius, radius))
    inside = functional.pad(torch.ones_like(image[0, 0]), (radius, radius))
    total = sum(tap * padded[..., i : i + width] for i, tap in enumerate(taps))
    weight = sum(tap * inside[i : i + width] for i, tap in enumerate(taps))
    return torch.as_tensor(total / weight)


def _link(gradient: Tensor, low: float, high: float) -> Tensor:
    """Suppression of non-maxima, then hysteresis: (2, H, W) -> (H, W) bool."""
    down, right = gradient
    magnitude = torch.hypot(*gradient)
    steep, flat = torch.maximum(down.abs(), right.abs()), torch.minimum(down.abs(), right.abs())
    part = flat / steep.clamp(min=torch.finfo(steep.dtype).tiny)  # how far the gradient leans to the diagonal
    around = functional.pad(magnitude, (1, 1, 1, 1))

    def at(dy: int, dx: int) -> Tensor:
        height, width = magnitude.shape
        return around[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    vertical, same_sign = down.abs() > right.abs(), (down >= 0) == (right >= 0)
    peak = torch.ones_like(vertical)
    for side in (1, -1):
        straight = torch.where(vertical, at(side, 0), at(0, side))
        rising = torch.where(vertical, at(side, -side), at(-side, side))
        diagonal = torch.where(same_sign, at(side, side), rising)
        peak &= (1 - part) * straight + part * diagonal <= magnitude
    peak[[0, -1]] = False
    peak[:, [0, -1]] = False
    weak, strong = torch.stack([peak & (magnitude >= low), peak & (magnitude >= high)]).cpu()
    return _grow(strong, weak).to(gradient.device)


def _grow(seeds: Tensor, allowed: Tensor) -> Tensor:
    """Allowed pixels that an 8-connected path of allowed pixels joins to a seed; the border must be empty."""
    width = allowed.shape[1]
    free, front = (allowed & ~seeds).flatten(), seeds.flatten().nonzero()
    steps = torch.tensor([dy * width + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx])
    edges = seeds.flatten().clone()
    while len(front):
        near = (front.reshape(-1, 1) + steps).flatten()
        front = near[free[near]].unique()
        free[front] = False
        edges[front] = True
    return edges.reshape(allowed.shape)
