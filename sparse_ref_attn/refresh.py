"""When stored reference keys and values are computed anew: at which steps of a run the references run again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checks import is_int, is_number
from .errors import ConfigError

__all__ = ["At", "Drift", "Every", "Never", "Refresh", "from_dict", "named", "standard"]

Place = int | float
"""A number of steps, or a share of the run."""


class Refresh(ABC):
    """The *full* steps of a run, in which the references run and their keys and values are stored.

    The first step of a run is always one.
    """

    @abstractmethod
    def steps(self, total: int) -> frozenset[int]:
        """Full steps of a run of `total` steps, as far as they are known before it."""

    def check(self, total: int) -> None:
        """Raise ConfigError where it makes no sense for a run of `total` steps."""
        return

    @property
    def needs_total(self) -> bool:
        """Whether it counts in shares of a run, whose number of steps must then be known."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {"kind": type(self).__name__, **fields}


@dataclass(frozen=True)
class Every(Refresh):
    """At regular distances.

    Parameters
    ----------
    n : int or float
        Distance between full steps: steps (at least 1), or a share of the run in (0, 1). Full steps stand at its
        multiples.
    warmup : int
        First steps of a run that are full, at least 1.
    last : int
        Last steps of a run that are full, at least 0.

    Raises
    ------
    ConfigError
        For a value outside its range.

    Examples
    --------
    >>> sorted(Every(4, warmup=2).steps(12)), sorted(Every(0.5).steps(4)), sorted(Every(8, last=2).steps(12))
    ([0, 1, 4, 8], [0, 2], [0, 8, 10, 11])
    """

    n: Place
    warmup: int = 1
    last: int = 0

    def __post_init__(self) -> None:
        _check_place("n", self.n, least=1)
        for name, least in (("warmup", 1), ("last", 0)):
            value = getattr(self, name)
            if not is_int(value, least):
                raise ConfigError(f"{name} must be a number of steps of at least {least}, got {value!r}")

    @property
    def needs_total(self) -> bool:
        return isinstance(self.n, float) or self.last > 0

    def steps(self, total: int) -> frozenset[int]:
        distance = max(1.0, self.n * total if isinstance(self.n, float) else float(self.n))
        regular = {math.floor(i * distance + 0.5) for i in range(math.ceil(total / distance))}
        return frozenset(
            step for step in range(total) if step < self.warmup or step in regular or step >= total - self.last
        )


@dataclass(frozen=True)
class At(Refresh):
    """At given steps.

    Parameters
    ----------
    places : sequence of int or float
        Steps from 0, or shares of the run in (0, 1). The first step is full whether it is named or not, and a step that
        a run does not have is none.

    Raises
    ------
    ConfigError
        For a value outside its range.

    Examples
    --------
    >>> sorted(At((1, 4, 8)).steps(12)), sorted(At((0.25, 0.5)).steps(28))
    ([0, 1, 4, 8], [0, 7, 14])
    """

    places: Sequence[Place]

    def __post_init__(self) -> None:
        places = self.places
        if isinstance(places, (str, bytes)) or not isinstance(places, Sequence) or not places:
            raise ConfigError(
                f"At takes the steps at which references are computed, at least one, got {places!r}; "
                "Never() computes them in the first step alone"
            )
        for place in places:
            _check_place("each place", place, least=0)
        object.__setattr__(self, "places", tuple(places))

    @property
    def needs_total(self) -> bool:
        return any(isinstance(place, float) for place in self.places)

    def steps(self, total: int) -> frozenset[int]:
        at = (math.floor(place * total + 0.5) if isinstance(place, float) else place for place in self.places)
        return frozenset({0, *(step for step in at if step < total)})


@dataclass(frozen=True)
class Never(Refresh):
    """In the first step alone.

    Examples
    --------
    >>> sorted(Never().steps(28))
    [0]
    """

    def steps(self, total: int) -> frozenset[int]:
        return frozenset({0})


@dataclass(frozen=True)
class Drift(Refresh):
    """When the stored keys and values are expected to be out of date.

    Each full step tells how far keys and values have moved since the last one, and how long that took; the next full
    step comes when, moving on as fast, they would have moved by `threshold`.

    Parameters
    ----------
    threshold : float
        Relative change, norm of the difference over norm, of the layer that moved most, above 0.
    at_most_every : int
        Steps that lie between two full ones at least, >= 1: no two full steps are nearer than this, but for the second
        one, with which the first is compared.
    at_least_every : int or float
        Steps after which the stored are too old in any case, or a share of the run in (0, 1).

    Raises
    ------
    ConfigError
        For a value outside its range, and, when it begins, for a run of one step, in which nothing can be compared.

    Examples
    --------
    >>> Drift(0.2).wait(drift=0.1, age=1, total=28), Drift(0.2).wait(0.05, 2, 28), Drift(0.2).wait(0.5, 4, 28)
    (2, 8, 2)
    """

    threshold: float
    at_most_every: int = 2
    at_least_every: Place = 1 / 3

    def __post_init__(self) -> None:
        if not is_number(self.threshold) or not 0 < self.threshold < math.inf:
            raise ConfigError(f"threshold must be a relative change above 0, got {self.threshold!r}")
        every = self.at_most_every
        if not is_int(every, 1):
            raise ConfigError(f"at_most_every must be a number of steps of at least 1, got {every!r}")
        _check_place("at_least_every", self.at_least_every, least=1)
        if isinstance(self.at_least_every, int) and self.at_least_every < every:
            raise ConfigError(
                f"at_least_every must be no smaller than at_most_every, got {self.at_least_every} and {every}"
            )

    @property
    def needs_total(self) -> bool:
        return isinstance(self.at_least_every, float)

    def steps(self, total: int) -> frozenset[int]:
        """The two that are compared first, and those that age alone asks for."""
        oldest = self.oldest(total)
        return frozenset({0, *range(min(1, total - 1), total, oldest)})

    def check(self, total: int) -> None:
        if total < 2:
            raise ConfigError(f"Drift compares two full steps: a run must have at least 2 steps, got {total}")

    def oldest(self, total: int) -> int:
        """Steps after which the stored are too old in any case."""
        given = self.at_least_every
        return max(self.at_most_every, round(given * total) if isinstance(given, float) else given)

    def wait(self, drift: float, age: int, total: int) -> int:
        """Steps until the next full one, where keys and values moved by `drift` in `age` steps."""
        expected = self.oldest(total) if drift <= 0 else math.floor(age * self.threshold / drift + 1e-6)
        return min(max(expected, self.at_most_every), self.oldest(total))


def standard(total: int | None) -> Refresh:
    """What a run of `total` steps does that is told nothing: quarters of it, or halves of one of up to eight steps;
    where `total` is not known, every fourth step.

    Examples
    --------
    >>> sorted(standard(12).steps(12)), sorted(standard(28).steps(28)), sorted(standard(4).steps(4))
    ([0, 3, 6, 9], [0, 7, 14, 21], [0, 2])
    """
    if total is None:
        return Every(4)
    return Every(0.5) if total <= 8 else Every(0.25)


def named(text: str) -> Refresh:
    """What people write: ``"4"`` or ``"25%"``, every so many steps or shares of the run; ``"0,4,8"``, at these; or
    ``"never"``, or ``"drift:0.3"``.

    Raises
    ------
    ConfigError
        If it is none of these, or a number is outside its range.

    Examples
    --------
    >>> named("25%"), named("0,4"), named("Never")
    (Every(n=0.25, warmup=1, last=0), At(places=(0, 4)), Never())
    """
    name, _, value = text.strip().lower().partition(":")
    try:
        if name == "never":
            return Never()
        if name == "drift":
            return Drift(float(value))
        places = [_place(part.strip()) for part in text.split(",")]
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(
            f"must be steps (4), a share (25%), several of them (0,4,8), never, or drift:0.3, got {text!r}"
        ) from None
    return At(places) if len(places) > 1 else Every(places[0])


def _place(text: str) -> Place:
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if text.isdecimal() else float(text)


def from_dict(data: Mapping[str, Any]) -> Refresh:
    """The inverse of `Refresh.to_dict`."""
    kinds: dict[str, type[Any]] = {kind.__name__: kind for kind in (Every, At, Never, Drift)}
    fields = dict(data)
    name = fields.pop("kind", None)
    if name not in kinds:
        raise ConfigError(f"a refresh must be one of {', '.join(kinds)}, got {name!r}")
    try:
        made: Refresh = kinds[name](**fields)
    except TypeError as error:
        raise ConfigError(f"a {name} must have the fields of that class, got {sorted(fields)}") from error
    return made


def _check_place(name: str, value: object, least: int) -> None:
    if isinstance(value, float):
        if not 0 < value < 1:
            raise ConfigError(f"{name} as a share of the run must lie in (0, 1), got {value!r}")
    elif not is_int(value, least):
        raise ConfigError(
            f"{name} must be a number of steps of at least {least}, or a share of the run in (0, 1), got {value!r}"
        )
