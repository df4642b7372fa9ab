"""Fréchet distance between two sets of pictures, FID: of Gaussians fitted to what an Inception network sees of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from .base import as_image
from .weights import inception

__all__ = ["InceptionFeatures", "frechet_distance"]

_SIDE = 299
_BATCH = 16


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians with the means and covariances of two sets.

    ``|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))`` (Heusel et al. 2017), with unbiased covariances. With the
    centred sets X1, X2 over ``(n - 1)^(1/2)`` the covariances are ``X^T X``, and the last trace is the sum of the
    singular values of ``X1 X2^T``: no root of a matrix is taken, and sets with fewer vectors than channels, whose
    covariances are singular, are no special case.

    Parameters
    ----------
    features, others : Tensor, shape (n, D) and (m, D)
        Finite; n and m at least 2.

    Returns
    -------
    float
        At least 0 but for rounding, in the features' units squared. It falls with the number of pictures: compare sets
        of one size.

    Raises
    ------
    ConfigError
        For other shapes, fewer than two vectors, or values that are not finite.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
    >>> round(frechet_distance(x, 3 * x), 6)  # (1 - 3)^2 + (2^0.5 - 18^0.5)^2
    12.0
    """
    both = [x.double() for x in (features, others)]
    if any(x.ndim != 2 or x.shape[0] < 2 for x in both) or both[0].shape[1] != both[1].shape[1]:
        raise ConfigError(
            "sets of features must be (n, D) and (m, D) with at least two vectors each, got "
            f"{tuple(features.shape)} and {tuple(others.shape)}"
        )
    if not all(bool(x.isfinite().all()) for x in both):
        raise ConfigError("features must be finite, got NaN or infinity")
    means = [x.mean(0) for x in both]
    centred = [(x - mean) / (x.shape[0] - 1) ** 0.5 for x, mean in zip(both, means, strict=True)]
    spread = sum(x.square().sum() for x in centred)
    a, b = (torch.linalg.qr(x, mode="r").R if x.shape[0] > x.shape[1] else x for x in centred)
    shared = torch.linalg.svdvals(a @ b.T).sum()
    return float((means[0] - means[1]).square().sum() + spread - 2 * shared)


class InceptionFeatures:
    """The 2,048 pooled features of the Inception network that FID is defined by (TensorFlow's, 2015-12-05).

    A picture is resized to 299 x 299 as TensorFlow 1 does it, bilinearly from the top left corner, whatever its shape.

    Raises
    ------
    ConfigError
        If the package with the weights is not installed, or has other weights.
    """

    name = "Inception, 2015-12-05"

    def __init__(self) -> None:
        self._model = inception()

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Any]) -> Tensor:
        """Features (n, 2048) float64 of n pictures, each in a form that `as_image` takes."""
        found, batch = [], []
        for picture in pictures:
            batch.append(_resized(as_image(picture)) * 255 / 128 - 1)
            if len(batch) == _BATCH:
                found.append(self._seen(batch))
                batch = []
        found += [self._seen(batch)] if batch else []
        if not found:
            raise ConfigError("a set of pictures must have one, got none")
        return torch.cat(found)

    def _seen(self, batch: list[Tensor]) -> Tensor:
        return self._model(torch.stack(batch)).double()


def _resized(image: Tensor) -> Tensor:
    """(3, H, W) -> (3, 299, 299): row i is read at ``i H / 299``, between the two rows around it."""
    for axis in (1, 2):
        size = image.shape[axis]
        at = torch.arange(_SIDE, dtype=torch.float64) * size / _SIDE
        low = at.long()
        part = (at - low).float().view(-1, *([1] * (2 - axis)))
        high = (low + 1).clamp(max=size - 1)
        image = torch.lerp(image.index_select(axis, low), image.index_select(axis, high), part)
    return image
