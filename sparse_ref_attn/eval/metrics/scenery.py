"""How near a picture's scenery is to the nearest texture that the procedural task could have drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from ...toy.textures import KINDS, PAIRS, PALETTE, PERIODS, Texture, mix, turns
from .base import as_image

__all__ = ["Nearest", "SceneryPsnr", "grown", "nearest_texture"]

_CELL = 4  # pixels of the first search
_RATES = 0.003  # between the frequencies of the first search, in periods a pixel
_ANGLES = {"stripes": 40, "checks": 16, "rings": 1, "dots": 20}
_CANDIDATES = 3  # of each kind that are refined
_NEAR, _SHRINK = 0.02, np.float32(0.7)  # the last step by the first search's, and a step by the one that did not help

_EQUAL = 1e-9  # mean squared error below which pixels are the same: 90 dB

Numbers = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Nearest:
    """The nearest texture, and the PSNR to it of the pixels that count, in dB."""

    texture: Texture
    psnr: float


class SceneryPsnr:
    """PSNR in dB of scenery that was left open, against the nearest of all textures that would have been right.

    A PSNR against one answer means nothing where there are many; against the nearest of them it says how well *one* of
    them was drawn. A blur of several is far from all of them.

    Parameters
    ----------
    hidden : ndarray of bool, shape (H, W)
        Pixels that do not count: the subjects', with a margin.

    Raises
    ------
    ConfigError
        When called, as `nearest_texture`.

    See Also
    --------
    nearest_texture : the search.
    """

    name = "scenery PSNR (dB)"

    def __init__(self, hidden: NDArray[np.bool_]) -> None:
        self._weight = (~hidden).astype(np.float32)

    def __call__(self, image: Any) -> float:
        """Of a picture, (H, W, 3) or (3, H, W) from 0 to 1 or a PIL image."""
        return self.nearest(image).psnr

    def nearest(self, image: Any) -> Nearest:
        """The texture and the PSNR."""
        return nearest_texture(as_image(image).movedim(0, -1).numpy(), self._weight)


def nearest_texture(picture: NDArray[np.float32], weight: NDArray[np.float32]) -> Nearest:
    """Search all kinds, angles, periods, places and pairs of colours.

    Parameters
    ----------
    picture : ndarray
        (side, side, 3), 0 to 1; side a multiple of 4.
    weight : ndarray
        (side, side), at least 0: how much each pixel counts.

    Raises
    ------
    ConfigError
        For another shape, or weights that are all 0.

    Notes
    -----
    A grid over all parameters at a quarter of the side, then a pattern search from the best of each kind at half of
    it, then at the whole. Of a texture itself it finds at least 45 dB: it is a lower bound of the true maximum. It is
    deterministic.

    Examples
    --------
    >>> texture = Texture("stripes", 0.5, 24.0, 3.0, 0.0, 7, 8)
    >>> found = nearest_texture(texture.picture(64), np.ones((64, 64), np.float32))
    >>> found.texture.kind, round(found.texture.period), found.psnr > 45
    ('stripes', 24, True)
    """
    side = picture.shape[0]
    if picture.shape != (side, side, 3) or side % _CELL or weight.shape != (side, side):
        raise ConfigError(
            f"a picture and its weights must be (side, side, 3) and (side, side), side a multiple of {_CELL}, got "
            f"{picture.shape} and {weight.shape}"
        )
    if not weight.any():
        raise ConfigError("the weights must count a pixel, got none above 0")
    coarse, middle, whole = (_Seen(picture, weight, step) for step in (_CELL, 2, 1))
    found = []
    for kind in KINDS:
        settings, maps = _bank(kind, side)
        errors, _ = coarse.errors(maps)
        best = errors.argsort(kind="stable")[:_CANDIDATES]
        found.append((kind, *middle.refined(kind, settings[best], side, _pitch(kind, side))))
    found = sorted(found, key=lambda one: float(one[2].min()))[:2]
    ends = [
        (kind, *whole.refined(kind, settings[errors.argmin()][None], side, _pitch(kind, side, 8)))
        for kind, settings, errors in found
    ]
    kind, settings, _ = min(ends, key=lambda one: float(one[2][0]))
    _, pairs = whole.errors(mix(kind, settings, side).reshape(1, -1))
    first, second = PAIRS[pairs[0]]
    angle, period, x, y = settings[0].tolist()
    texture = Texture(kind, angle, period, x, y, int(first), int(second))
    error = np.square(texture.picture(side) - picture, dtype=np.float64).mean(-1)
    return Nearest(texture, float(-10 * np.log10(max(np.average(error, weights=weight), _EQUAL))))


class _Seen:
    """A picture's pixels and weights, each the mean of a square of `step` pixels."""

    def __init__(self, picture: NDArray[np.float32], weight: NDArray[np.float32], step: int) -> None:
        self.step = step
        self.w = _means(weight, step).reshape(-1)
        pixels = np.stack([_means(weight * picture[..., channel], step).reshape(-1) for channel in range(3)], -1)
        self.sums = np.concatenate([self.w[:, None], pixels], 1)
        self.total = self.sums.sum(0)
        counted = self.w > 0
        self.square = float((np.square(pixels[counted]).sum(-1) / self.w[counted]).sum())

    def errors(self, maps: NDArray[np.float32]) -> tuple[Numbers, NDArray[np.intp]]:
        """Mean squared error of each map, (n, pixels), with its best pair of colours, and that pair."""
        first, second = PALETTE[PAIRS[:, 0]], PALETTE[PAIRS[:, 1]]
        mixed = maps @ self.sums
        share, seen = mixed[:, :1], mixed[:, 1:]
        square = (np.square(maps) @ self.w)[:, None]
        count, colours = self.total[0], self.total[1:]
        error = (
            self.square - 2 * ((colours - seen) @ first.T + seen @ second.T)
            + np.square(first).sum(1) * (count - 2 * share + square) + np.square(second).sum(1) * square
            + 2 * (first * second).sum(1) * (share - square)
        ) / (3 * count)  # fmt: skip
        best = error.argmin(1)
        return error[np.arange(len(maps)), best], best

    def refined(
        self, kind: str, settings: NDArray[np.float32], side: int, pitch: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], Numbers]:
        """The settings, (n, 4), moved downhill by ever smaller steps along axes that turn; their errors."""
        low, high = _bounds(kind, side)
        errors, _ = self.errors(mix(kind, settings, side, self.step).reshape(len(settings), -1))
        far, each, random = np.full((len(settings), 1), 0.5, np.float32), np.arange(len(settings)), _axes()
        while (far > _NEAR).any():
            axes = next(random)
            moves = np.concatenate([axes, -axes])[:, None] * pitch * far
            tried = np.clip(settings + moves, low, high)
            maps = mix(kind, tried.reshape(-1, 4), side, self.step)
            there = self.errors(maps.reshape(len(maps), -1))[0].reshape(len(moves), -1)
            best = there.argmin(0)
            better = there[best, each] < errors
            settings = np.where(better[:, None], tried[best, each], settings)
            errors = np.where(better, there[best, each], errors)
            far = np.where(better[:, None], far, far * _SHRINK)
        return settings, errors


def grown(marked: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """What is marked, and every pixel at most `by` rows and columns from it.

    Examples
    --------
    >>> grown(np.array([[True, False, False, False]]), 2)
    array([[ True,  True,  True, False]])
    """
    for axis in (0, 1):
        for _ in range(by):
            narrow = marked.swapaxes(0, axis)
            wide = narrow.copy()
            wide[1:] |= narrow[:-1]
            wide[:-1] |= narrow[1:]
            marked = wide.swapaxes(0, axis)
    return marked


def _axes() -> Iterator[NDArray[np.float32]]:
    """Four directions at right angles, (4, 4), other ones each time, the same in every search."""
    random = np.random.default_rng(0)
    while True:
        yield np.linalg.qr(random.normal(size=(4, 4)))[0].astype(np.float32)


@lru_cache(maxsize=8)
def _bank(kind: str, side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Settings of a kind, (n, 4) of angle, period, x and y, close enough that one is near any; and their maps."""
    low, high = PERIODS[kind]
    rates = np.linspace(1 / high, 1 / low, 1 + round((1 / low - 1 / high) / _RATES))
    angles = np.arange(_ANGLES[kind]) * turns(kind) / _ANGLES[kind]
    if kind == "rings":
        at = np.arange(2.5, side, 5)
        places = [(0.0, 1 / rate, x, y) for rate in rates for x in at for y in at]
    else:
        steps = {"stripes": (4, 1), "checks": (4, 2), "dots": (4, 4)}[kind]
        places = []
        for angle in angles:
            for rate in rates:
                for i, j in np.ndindex(*steps):
                    along, across = (k / 4 / rate for k in (i, j))
                    x = side / 2 + along * np.cos(angle) - across * np.sin(angle)
                    y = side / 2 + along * np.sin(angle) + across * np.cos(angle)
                    places.append((angle, 1 / rate, x, y))
    settings = np.array(places, np.float32)
    return settings, mix(kind, settings, side, _CELL).reshape(len(settings), -1)


def _pitch(kind: str, side: int, finer: int = 1) -> NDArray[np.float32]:
    """How far the settings of the first search are apart, or that many times finer."""
    period = sum(PERIODS[kind]) / 2
    place = 5.0 if kind == "rings" else period / 4
    return np.array([turns(kind) / _ANGLES[kind], _RATES * period**2, place, place], np.float32) / np.float32(finer)


def _bounds(kind: str, side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and largest settings that the task draws; the place of what repeats is free."""
    low, high = PERIODS[kind]
    if kind == "rings":
        return np.array([0, low, 0, 0], np.float32), np.array([0, high, side, side], np.float32)
    return np.array([-10, low, -side, -side], np.float32), np.array([10, high, 2 * side, 2 * side], np.float32)


def _means(values: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    side = len(values) // step
    found: NDArray[np.float32] = values.reshape(side, step, side, step).mean((1, 3), dtype=np.float32)
    return found
