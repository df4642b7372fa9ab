"""Scenery that a prompt leaves open: two colours in a texture, of any of four kinds alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .words import COLOURS

__all__ = ["KINDS", "PAIRS", "PALETTE", "PERIODS", "Texture", "mix", "random_texture", "turns"]

PERIODS = {"stripes": (20.0, 40.0), "checks": (28.0, 48.0), "rings": (20.0, 40.0), "dots": (20.0, 36.0)}
"""Shortest and longest period of each kind, in pixels."""

KINDS = tuple(PERIODS)
PALETTE = np.array(list(COLOURS.values()), np.float32) / 255
"""(12, 3), 0 to 1: the colours that prompts can name."""

_APART = 0.3
PAIRS = np.argwhere(np.sqrt(np.square(PALETTE[:, None] - PALETTE).mean(-1)) > _APART)
"""(n, 2) rows of `PALETTE` that are far enough apart to go together, in both orders."""

_DOT = 0.39  # radius of a dot by the period: dots cover nearly half of the picture, as the other kinds' bands do

Shares = NDArray[np.float32]


@dataclass(frozen=True)
class Texture:
    """One texture.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    angle : float
        In radians; rings have none.
    period : float
        In pixels.
    x, y : float
        In pixels: the centre of the rings, elsewhere where the texture begins.
    first, second : int
        Rows of `PALETTE`.

    Examples
    --------
    >>> rings = Texture("rings", 0.0, 20.0, 32.0, 32.0, 7, 8)
    >>> rings.picture(64).shape, (255 * rings.picture(64)[32, 32]).round().tolist()
    ((64, 64, 3), [30.0, 30.0, 30.0])
    """

    kind: str
    angle: float
    period: float
    x: float
    y: float
    first: int
    second: int

    def picture(self, side: int) -> NDArray[np.float32]:
        """(side, side, 3), 0 to 1."""
        share = mix(self.kind, [self.angle, self.period, self.x, self.y], side)[..., None]
        return (PALETTE[self.first] * (1 - share) + PALETTE[self.second] * share).astype(np.float32)


def random_texture(rng: np.random.Generator, side: int) -> Texture:
    """Kind, direction, period, place and colours at random, for a picture of `side` pixels."""
    kind = KINDS[rng.integers(len(KINDS))]
    angle, period = rng.uniform(0, turns(kind)), rng.uniform(*PERIODS[kind])
    x, y = rng.uniform(0, side, 2)
    first, second = PAIRS[rng.integers(len(PAIRS))]
    return Texture(kind, float(angle), float(period), float(x), float(y), int(first), int(second))


def turns(kind: str) -> float:
    """The angle, in radians, after which a kind is itself again or with its colours swapped; 0 for rings."""
    return {"stripes": np.pi, "rings": 0.0}.get(kind, np.pi / 2)


def mix(kind: str, settings: ArrayLike, side: int, step: int = 1) -> Shares:
    """Share of the second colour at each pixel, 0 to 1; edges are as wide as a step.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    settings : array
        (4,) or (..., 4): angle, period, x and y as `Texture` has them.
    side : int
        Of the picture, in pixels.
    step : int
        Pixels from one to the next that is computed, each in the middle of the square that it stands for.

    Returns
    -------
    ndarray
        (..., side / step, side / step).
    """
    angle, period, x, y = np.moveaxis(np.asarray(settings, np.float32), -1, 0)[..., None, None]
    rows, columns = np.mgrid[:side:step, :side:step].astype(np.float32) + np.float32((step - 1) / 2)
    right, down = columns - x, rows - y
    if kind == "rings":
        return _band(np.hypot(right, down) + period / 4, period, step)
    along = right * np.cos(angle) + down * np.sin(angle)
    if kind == "stripes":
        return _band(along, period, step)
    across = down * np.cos(angle) - right * np.sin(angle)
    if kind == "checks":
        one, other = _band(along, period, step), _band(across, period, step)
        return one + other - 2 * one * other
    nearest = [v - period * np.round(v / period) for v in (along, across)]
    return _inside(_DOT * period - np.hypot(*nearest), step)


def _band(distance: Any, period: Any, edge: int) -> Any:
    """1 in the first half of each period and 0 in the second."""
    from_middle = distance - period / 4
    from_middle -= period * np.round(from_middle / period)
    return _inside(period / 4 - np.abs(from_middle), edge)


def _inside(depth: Any, edge: int) -> Any:
    """0 outside, 1 inside, and between them over an edge of so many pixels."""
    return np.clip(depth / edge + np.float32(0.5), 0, 1)
