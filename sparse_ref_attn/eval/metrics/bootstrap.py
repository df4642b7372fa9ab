"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

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
    """Mean and bootstrap interval (BCa, scipy); for a paired comparison give the differences.

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
    from scipy.stats import bootstrap

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
    drawn: Any = SimpleNamespace(bootstrap_distribution=data[_draws(len(data), resamples, seed)].mean(1))
    found = bootstrap(
        (data,), np.mean, confidence_level=level, n_resamples=0, bootstrap_result=drawn
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


@lru_cache(maxsize=2)
def _draws(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Places of the values of each resample, as scipy draws them: the same for any as many values."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))
