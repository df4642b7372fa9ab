"""Budgets that follow a curve over the run: constant, ReCAST's polynomial, linear, cosine, descending, in steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from ..errors import BudgetError, ConfigError
from .base import Budget, Keep, check_exponent, check_keep, check_order, tokens_of
from .clock import Clock

__all__ = ["Constant", "Cosine", "Descending", "Linear", "Pieces", "Polynomial"]


@dataclass(frozen=True)
class Constant(Budget):
    """The same amount at every step.

    Parameters
    ----------
    keep : int or float
        Tokens (>= 1) or ratio in (0, 1].

    Examples
    --------
    >>> Constant(0.25).counts(Clock.uniform(0, 4), [4096, 1000])
    (1024, 250)
    >>> Constant(512, per="all").counts(Clock.uniform(0, 4), [4096, 1000])
    (512,)
    """

    keep: Keep
    per: str = "reference"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep("keep", self.keep)

    def amounts(self) -> dict[str, Keep]:
        return {"keep": self.keep}

    def tokens_at(self, clock: Clock, size: int) -> float:
        return tokens_of(self.keep, size)


class _Curve(Budget):
    """Between two amounts; the weight of the high one is 0 to 1."""

    low: Keep
    high: Keep

    def _weight(self, progress: float) -> float:
        raise NotImplementedError

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep("low", self.low)
        check_keep("high", self.high)
        check_order("low", self.low, "high", self.high)

    def amounts(self) -> dict[str, Keep]:
        return {"low": self.low, "high": self.high}

    def tokens_at(self, clock: Clock, size: int) -> float:
        low, high = tokens_of(self.low, size), tokens_of(self.high, size)
        return low + (high - low) * self._weight(clock.progress)

    def _check_size(self, name: str, size: int) -> None:
        super()._check_size(name, size)
        if tokens_of(self.low, size) > tokens_of(self.high, size):
            raise BudgetError(
                f"low must not exceed high, got low {self.low} and high {self.high}, "
                f"which is {tokens_of(self.high, size):g} tokens for {name} of {size} tokens"
            )


class _PowerCurve(_Curve):
    """A curve with an exponent."""

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_exponent(self.gamma)


@dataclass(frozen=True)
class Polynomial(_PowerCurve):
    """ReCAST's rising budget, eq. (4).

    ``N(t) = N_min + (N_max - N_min) (1 - t/T)^gamma``

    Parameters
    ----------
    low, high : int or float
        N_min and N_max, low <= high: tokens or ratio of each reference. The paper's 256 and 1024 of 4,096 tokens are
        the ratios 1/16 and 1/4, which also suit references of other sizes.
    gamma : float
        Exponent > 0; the paper's is 2. Above 1 the budget stays low for long.

    Notes
    -----
    The clock is ``progress = 1 - t/T``: 0 at the first, high-noise step, where N = low, and 1 at the last, where N =
    high. With 256, 1024 and gamma 2, eq. (4) averages 517 tokens over 28 uniform steps, not the ~600 that the paper
    states; when step 0 is the dense profiling step over 4,096 tokens, the mean is 654 and N = 256 never runs.

    References
    ----------
    ReCAST, section 2.4, eq. (4).

    Examples
    --------
    >>> [Polynomial(256, 1024).counts(Clock.uniform(i, 5), [4096])[0] for i in range(5)]
    [256, 304, 448, 688, 1024]
    """

    low: Keep
    high: Keep
    gamma: float = 2.0
    per: str = "reference"

    def _weight(self, progress: float) -> float:
        return progress**self.gamma


@dataclass(frozen=True)
class Linear(_Curve):
    """Rises in a straight line from `low` at the first step to `high` at the last: `Polynomial` with gamma 1.

    Parameters
    ----------
    low, high : int or float
        Tokens or ratio, low <= high.

    Examples
    --------
    >>> [Linear(100, 200).counts(Clock.uniform(i, 3), [4096])[0] for i in range(3)]
    [100, 150, 200]
    """

    low: Keep
    high: Keep
    per: str = "reference"

    def _weight(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cosine(_Curve):
    """Rises from `low` to `high` along half a cosine, ``(1 - cos(pi progress)) / 2``: flat at both ends.

    Parameters
    ----------
    low, high : int or float
        Tokens or ratio, low <= high.

    Examples
    --------
    >>> [Cosine(100, 200).counts(Clock.uniform(i, 5), [4096])[0] for i in range(5)]
    [100, 115, 150, 185, 200]
    """

    low: Keep
    high: Keep
    per: str = "reference"

    def _weight(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Descending(_PowerCurve):
    """Falls from `high` at the first, high-noise step to `low` at the last: `Polynomial` run backwards.

    ``N(t) = low + (high - low) (t/T)^gamma``, so that on the uniform clock it spends as many tokens as
    ``Polynomial(low, high, gamma)`` and the two can be compared. Published work disagrees on which way is better.

    Parameters
    ----------
    high, low : int or float
        Tokens or ratio, low <= high.
    gamma : float
        Exponent > 0.

    Examples
    --------
    >>> [Descending(1024, 256).counts(Clock.uniform(i, 5), [4096])[0] for i in range(5)]
    [1024, 688, 448, 304, 256]
    """

    high: Keep
    low: Keep
    gamma: float = 2.0
    per: str = "reference"

    def _weight(self, progress: float) -> float:
        return (1.0 - progress) ** self.gamma


@dataclass(frozen=True)
class Pieces(Budget):
    """Constant stretches with explicit boundaries.

    Parameters
    ----------
    keeps : tuple of (int or float)
        The amount of each stretch: tokens or ratio.
    at : tuple of float
        Progress in (0, 1), ascending, at which each stretch after the first begins; one fewer than `keeps`.

    Examples
    --------
    >>> b = Pieces(keeps=(0.1, 0.5), at=(0.5,))
    >>> [b.counts(Clock.uniform(i, 5), [100])[0] for i in range(5)]
    [10, 10, 50, 50, 50]
    """

    keeps: tuple[Keep, ...]
    at: tuple[float, ...]
    per: str = "reference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keeps, tuple) or not isinstance(self.at, tuple):
            raise ConfigError(f"keeps and at must be tuples, got {self.keeps!r} and {self.at!r}")
        if not self.keeps or len(self.at) != len(self.keeps) - 1:
            raise ConfigError(
                f"at must hold one boundary fewer than keeps has amounts, got {len(self.keeps)} amounts "
                f"and {len(self.at)} boundaries"
            )
        for i, keep in enumerate(self.keeps):
            check_keep(f"keeps[{i}]", keep)
        edges = (0.0, *self.at, 1.0)
        if not all(isinstance(a, int | float) for a in self.at) or not all(a < b for a, b in pairwise(edges)):
            raise ConfigError(f"boundaries must ascend strictly within (0, 1), got {self.at}")

    def amounts(self) -> dict[str, Keep]:
        return {f"keeps[{i}]": keep for i, keep in enumerate(self.keeps)}

    @property
    def varies(self) -> str:
        return "never" if super().varies == "never" else "pieces"

    def tokens_at(self, clock: Clock, size: int) -> float:
        return tokens_of(self.keeps[bisect_right(self.at, clock.progress)], size)
