"""The one chooser, for presets and plans: of what each candidate loses, and how fast it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..candidates import CANDIDATES, held_back
from ..frontier import Loss, Point, loss_of, read_points
from ..presets import Choice

__all__ = ["fastest_within", "known", "least_loss", "within"]


def known(steps: int, points: Sequence[Point] | None = None) -> dict[str, Loss]:
    """What each candidate that may be chosen loses in a run of `steps` steps, of those that were measured to the end.

    Parameters
    ----------
    steps : int
    points : sequence of Point, optional
        Default the frontier that ships. Points of fewer seeds than others are of settings that a sweep gave up.

    Examples
    --------
    >>> found = known(28)
    >>> "stored-halves" in found, "tiles-8th-halves" in found
    (True, False)
    """
    points = read_points() if points is None else points
    most = max((p.seeds for p in points), default=0)
    points = [p for p in points if p.seeds == most]
    losses = {key: loss_of(points, key, steps) for key, config in CANDIDATES.items() if not held_back(config)}
    return {key: loss for key, loss in losses.items() if loss is not None}


def fastest_within(bounds: Choice, speeds: Mapping[str, float], losses: Mapping[str, Loss]) -> str | None:
    """The fastest candidate that stays within a preset's bounds; None where none does.

    Parameters
    ----------
    bounds : Choice
    speeds : mapping of str to float
        FLOP ratio of each candidate that can run.
    losses : mapping of str to Loss
        As `known`.

    Examples
    --------
    >>> losses = {"a": Loss(0.0, -0.2, 0.1, 36.0, 12, 12), "b": Loss(-0.6, -0.9, -0.3, 29.0, 12, 12)}
    >>> bounds = Choice("", loss_db=1.0, picture_db=30.0), Choice("", loss_db=1.0, picture_db=None)
    >>> [fastest_within(each, {"a": 1.6, "b": 1.8}, losses) for each in bounds]
    ['a', 'b']
    """
    found = [key for key in speeds if key in losses and within(losses[key], bounds)]
    return max(found, key=speeds.__getitem__, default=None)


def least_loss(speedup: float, speeds: Mapping[str, float], losses: Mapping[str, Loss]) -> str | None:
    """The candidate that loses least of those that are as fast as `speedup`; None where none is.

    Losses that are the same to a tenth of a dB, and gains, are told apart by the picture against the dense one.

    Examples
    --------
    >>> losses = {"a": Loss(0.12, -0.2, 0.1, 36.0, 12, 12), "b": Loss(0.22, 0.1, 0.3, 34.0, 12, 12)}
    >>> [least_loss(speedup, {"a": 1.6, "b": 1.8}, losses) for speedup in (1.5, 1.7, 1.9)]
    ['a', 'b', None]
    """
    enough = [key for key, speed in speeds.items() if speed >= speedup and key in losses]
    return max(enough, key=lambda key: _quality(losses[key]), default=None)


def within(loss: Loss, bounds: Choice) -> bool:
    """Whether a loss stays within a preset's bounds in every family.

    Examples
    --------
    >>> within(Loss(0.0, -0.2, 0.1, 36.0, 12, 12), Choice("", loss_db=0.3, picture_db=40.0))
    False
    """
    alike = bounds.picture_db is None or (loss.dense_db is not None and loss.dense_db >= bounds.picture_db)
    return alike and loss.low >= -bounds.loss_db


def _quality(loss: Loss) -> tuple[float, float]:
    return min(0.0, round(loss.db, 1)), loss.dense_db or 0.0
