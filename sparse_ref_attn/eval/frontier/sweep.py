"""Successive halving: all settings on a few examples, then the better half of them on twice as many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...candidates import DENSE
from ..evaluate import evaluate
from ..examples import Examples, Mask
from ..grid import BASE
from ..models import EvalModel
from ..rows import read_rows
from ..scores import Scorer
from ..settings import Setting
from .listed import GEOMETRIES, Key, all_settings
from .points import Losses, losses_of

__all__ = ["Sweep", "rungs", "survivors", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """Settings, by key and steps, as `evaluate` takes them.

    A row's method is the key, and its share that of the steps.

    Parameters
    ----------
    settings : mapping of (str, int) to Setting
    base : int
        Steps of the dense run.
    seeds, families, count
        As in `Grid`.
    """

    settings: Mapping[Key, Setting]
    base: int
    seeds: int = 1
    families: tuple[str, ...] | None = None
    count: int | None = None
    mean_over: str = "dropping"

    def cells(self) -> list[tuple[str, float]]:
        """Keys and shares of the steps, the base first."""
        return [BASE, *((key, steps / self.base) for key, steps in self.settings)]

    def setting(self, model: EvalModel, name: str, keep: float, seed: int, masks: Sequence[Mask] | None) -> Setting:
        """The setting of a cell, the same for every model and example."""
        return self.settings[name, round(keep * self.base)]


def rungs(first: int, last: int) -> list[int]:
    """Examples of each rung: doubled from `first` on, `last` at the end.

    Examples
    --------
    >>> rungs(8, 64), rungs(8, 20), rungs(8, 4)
    ([8, 16, 32, 64], [8, 16, 20], [4])
    """
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, last]


def sweep(
    out: str | Path,
    data: Examples,
    model: EvalModel,
    scorer: Scorer,
    *,
    first: int,
    last: int,
    seeds: int = 1,
    families: tuple[str, ...] | None = None,
    keys: Sequence[str] | None = None,
    about: Mapping[str, Any] | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> dict[Key, Losses]:
    """Measure what every setting loses, those that stay near the frontier on ever more examples.

    It goes on where it was stopped, and processes share it, as `evaluate`: which settings are left is told by the rows
    alone.

    Parameters
    ----------
    out, data, scorer, about
        As for `evaluate`.
    model : EvalModel
        Its steps are those of the dense run.
    first, last : int
        Examples of each family, on the first and the last rung (`rungs`).
    seeds, families
        As in `Grid`.
    keys : sequence of str, optional
        As for `all_settings`.
    told : callable of str
        Given a line at each rung.

    Raises
    ------
    ConfigError
        As `evaluate` and `all_settings`, or where a family has fewer than `last` examples.
    """
    base, left = model.steps, all_settings(model.steps, keys)
    data.chosen(families, last)
    losses: dict[Key, Losses] = {}
    for number, count in enumerate(counts := rungs(first, last), 1):
        told(f"rung {number} of {len(counts)}: {len(left)} settings on {count} examples of each family, {seeds} seeds")
        evaluate(out, data, [model], Sweep(left, base, seeds, families, count), scorer, about=about)
        losses |= losses_of(read_rows(Path(out))[1], data, model.name, base)
        if number < len(counts):
            kept = survivors(left, losses, base)
            left = {key: setting for key, setting in left.items() if key in kept}
    return losses


def survivors(settings: Mapping[Key, Setting], losses: Mapping[Key, Losses], base: int) -> set[Key]:
    """The better half of some settings, and the dense run in fewer steps, which is always measured to the end.

    A setting is the better the less it loses beyond the best that is as fast: at the sizes at which it looks best, in
    the subject or in the picture, whichever speaks for it.

    Parameters
    ----------
    settings : mapping of (str, int) to Setting
    losses : mapping of (str, int) to Losses
        Of all of them.
    base : int
        Steps of the dense run.
    """
    known = [key for key in settings if key in losses]
    behind = {key: [0.0] if key[0] == DENSE else [] for key in known}
    for model, references in GEOMETRIES:
        speed = {key: settings[key].flop_ratio(base, model, references) for key in known}
        for measure in ("subject", "picture"):
            worst = {key: value for key in known if (value := losses[key].worst(measure, references)) is not None}
            for key, value in worst.items():
                best = max(other for each, other in worst.items() if speed[each] >= speed[key] - 1e-9)
                behind[key].append(best - value)
    others = [key for key in known if key[0] != DENSE]
    ordered = sorted(others, key=lambda key: (min(behind[key], default=float("inf")), key))
    return {*ordered[: -(-len(ordered) // 2)], *(key for key in known if key[0] == DENSE)}
