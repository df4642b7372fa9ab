"""LPIPS and DISTS: distances in the features of a network trained to tell objects apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import Metric, check_pair
from .weights import dists_weights, lpips_weights

__all__ = ["Dists", "Lpips"]

_VGG = (2, 2, 3, 3, 3)
"""Convolutions in each stage of VGG16."""


def _vector(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


class Lpips(Metric):
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018); lower is closer.

    Parameters
    ----------
    net : {"alexnet", "vgg16"}

    Raises
    ------
    ConfigError
        If the package with the weights is not installed.
    """

    higher_is_better = False

    def __init__(self, net: str = "alexnet") -> None:
        self.name = f"LPIPS ({net})"
        self._net = net
        self._convolutions, self._heads = lpips_weights(net)
        self._mean, self._std = _vector((-0.030, -0.088, -0.188)), _vector((0.458, 0.448, 0.450))

    @torch.no_grad()
    def __call__(self, image: Any, other: Any) -> float:
        pair = torch.stack(check_pair(image, other)) * 2 - 1
        total = torch.zeros(())
        for features, head in zip(self._features((pair - self._mean) / self._std), self._heads, strict=True):
            unit = features / (features.norm(dim=1, keepdim=True) + 1e-10)
            total = total + functional.conv2d((unit[:1] - unit[1:]).square(), head).mean()
        return float(total)

    def _features(self, x: Tensor) -> list[Tensor]:
        if self._net == "vgg16":
            return _vgg_features(x, self._convolutions, lambda x: functional.max_pool2d(x, 2))
        found = []
        for i, (weight, bias) in enumerate(self._convolutions):
            if i in (1, 2):
                x = functional.max_pool2d(x, 3, 2)
            stride, padding = [(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)][i]
            x = functional.relu(functional.conv2d(x, weight, bias, stride, padding))
            found.append(x)
        return found


class Dists(Metric):
    """Deep image structure and texture similarity (Ding et al. 2020), on VGG16; lower is closer.

    Images are compared at the size they have.

    Raises
    ------
    ConfigError
        If a package with the weights is not installed.
    """

    name = "DISTS (VGG16)"
    higher_is_better = False

    def __init__(self) -> None:
        self._convolutions, _ = lpips_weights("vgg16")
        weights = dists_weights()
        total = weights["alpha"].sum() + weights["beta"].sum()
        channels = [3, 64, 128, 256, 512, 512]
        self._alpha, self._beta = ((weights[n] / total).split(channels, 1) for n in ("alpha", "beta"))
        self._mean, self._std = _vector((0.485, 0.456, 0.406)), _vector((0.229, 0.224, 0.225))

    @torch.no_grad()
    def __call__(self, image: Any, other: Any) -> float:
        pair = torch.stack(check_pair(image, other))
        stages = [pair, *_vgg_features((pair - self._mean) / self._std, self._convolutions, _l2_pool)]
        likeness = torch.zeros(())
        for x, alpha, beta in zip(stages, self._alpha, self._beta, strict=True):
            mean = x.mean((2, 3), keepdim=True)
            variance = (x - mean).square().mean((2, 3), keepdim=True)
            covariance = (x[:1] * x[1:]).mean((2, 3), keepdim=True) - mean[:1] * mean[1:]
            texture = (2 * mean[:1] * mean[1:] + 1e-6) / (mean.square().sum(0, keepdim=True) + 1e-6)
            structure = (2 * covariance + 1e-6) / (variance.sum(0, keepdim=True) + 1e-6)
            likeness = likeness + (alpha * texture + beta * structure).sum()
        return float(1 - likeness)


def _vgg_features(x: Tensor, convolutions: list[tuple[Tensor, Tensor]], pool: Any) -> list[Tensor]:
    found, layers = [], iter(convolutions)
    for stage, count in enumerate(_VGG):
        if stage:
            x = pool(x)
        for _ in range(count):
            weight, bias = next(layers)
            x = functional.relu(functional.conv2d(x, weight, bias, 1, 1))
        found.append(x)
    return found


def _l2_pool(x: Tensor) -> Tensor:
    """Every second pixel of the root of a Hann-weighted mean of squares (no aliasing, unlike a maximum)."""
    window = torch.hann_window(5, periodic=False)[1:-1]
    kernel = torch.outer(window, window)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 3, 3)
    return (functional.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()
