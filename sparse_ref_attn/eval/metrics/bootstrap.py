"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError

__all__ = ["Interval", "mean_interval"]


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_interval(
    values: Sequence[float],
    groups: Sequence[object] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 9999,
) -> Interval:
    """Mean and bootstrap interval (BCa, scipy's bit for bit); for a paired comparison give the differences.

    Parameters
    ----------
    values : sequence of float
        At least two groups of them.
    groups : sequence, optional
        What each value is of (a subject that was drawn with several seeds): values of one group are not independent, so
        groups are drawn, not values, and every group counts the same.
    level : float, in (0, 1)
    seed : int
    resamples : int
        How often the groups are drawn again.

    Raises
    ------
    ConfigError
        For fewer than two groups, or values that are not finite.

    Examples
    --------
    >>> mean_interval([1.0, 2.0, 3.0, 4.0]).mean
    2.5
    >>> mean_interval([1.0, 3.0, 4.0], ["a", "a", "b"]).mean
    3.0
    """
    data = np.asarray(values, dtype=np.float64)
    if not np.isfinite(data).all():
        raise ConfigError("values of an interval must be finite, got NaN or infinity")
    if groups is not None:
        if len(groups) != len(data):
            raise ConfigError(f"groups must name one for each value, got {len(groups)} for {len(data)}")
        own: dict[object, list[float]] = {}
        for value, group in zip(data, groups, strict=True):
            own.setdefault(group, []).append(value)
        data = np.array([np.mean(each) for each in own.values()])
    if len(data) < 2:
        raise ConfigError(f"an interval needs at least two independent values, got {len(data)}")
    mean = float(data.mean())
    if np.ptp(data) == 0:
        return Interval(mean, mean, mean)
    return Interval(mean, *_bounds(data, data[_draws(len(data), resamples, seed)].mean(1), level))


def _bounds(data: NDArray[np.float64], drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Of the bias-corrected and accelerated interval, as ``scipy.stats.bootstrap`` has it of these means."""
    from scipy.special import ndtr, ndtri

    count, many, mean = len(data), len(drawn), data.mean()
    bias = ndtri((np.count_nonzero(drawn < mean) + np.count_nonzero(drawn <= mean)) / (2 * many))
    places = np.arange(count - 1)
    without = data[places + (places >= np.arange(count)[:, None])].mean(1)  # each value in turn
    away = (count - 1) * (without.mean() - without)
    skew = 1 / 6 * ((away**3).sum() / float(count) ** 3) / ((away**2).sum() / float(count) ** 2) ** (3 / 2)
    ends = bias + float(ndtri((1 - level) / 2)) * np.array([1, -1])
    share = ndtr(bias + ends / (1 - skew * ends))
    at = share * many + (1 - share)
    below = np.clip(np.nan_to_num(at) // 1 - 1, 0, many - 1).astype(int)
    above = np.minimum(below + 1, many - 1)
    drawn = np.partition(drawn, [*below, *above])
    low, high = (1 - at % 1) * drawn[below] + at % 1 * drawn[above]
    return float(low), float(high)


@lru_cache(maxsize=2)
def _draws(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Places of the values of each resample, as scipy draws them: the same for any as many values."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))
