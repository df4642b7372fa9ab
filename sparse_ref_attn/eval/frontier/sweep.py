"""Successive halving: all settings on a few pictures, then the better half of them on at least twice as many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ...candidates import CANDIDATES, DENSE, held_back
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


def rungs(first: int, last: int, seeds: int = 1) -> list[tuple[int, int]]:
    """Examples and seeds of each rung: examples doubled from `first` to `last`, seeds halved from the last rung down.

    Examples
    --------
    >>> rungs(8, 64, seeds=3), rungs(8, 20), rungs(8, 4)
    ([(8, 1), (16, 1), (32, 1), (64, 3)], [(8, 1), (16, 1), (20, 1)], [(4, 1)])
    """
    counts = []
    while first < last:
        counts.append(first)
        first *= 2
    counts.append(last)
    return [(count, max(1, seeds >> left)) for left, count in zip(reversed(range(len(counts))), counts, strict=True)]


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
    alone, those of a rung's own examples and seeds.

    Parameters
    ----------
    out, data, scorer, about
        As for `evaluate`.
    model : EvalModel
        Its steps are those of the dense run.
    first, last : int
        Examples of each family, on the first and the last rung (`rungs`).
    seeds : int
        On the last rung.
    families
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
    for number, (count, drawn) in enumerate(rising := rungs(first, last, seeds), 1):
        words = f"{len(left)} settings on {count} examples of each family, {drawn} seed{'s' * (drawn > 1)}"
        told(f"rung {number} of {len(rising)}: {words}")
        evaluate(out, data, [model], Sweep(left, base, drawn, families, count), scorer, about=about)
        seen = {data.keys[i][0] for i in data.chosen(families, count)}
        rows = [row for row in read_rows(Path(out))[1] if row["example"] in seen and int(row["seed"]) < drawn]
        losses |= losses_of(rows, data, model.name, base)
        if number < len(rising):
            kept = survivors(left, losses, base)
            left = {key: setting for key, setting in left.items() if key in kept}
    return losses


def survivors(settings: Mapping[Key, Setting], losses: Mapping[Key, Losses], base: int) -> set[Key]:
    """Half of some settings: those that are always measured to the end, and the better ones of the others.

    A setting is the better the less it loses beyond the best that is as fast: at the sizes at which it looks best, in
    the subject or in the picture, whichever speaks for it, and of those that are alike there, over all of it. To the
    end go the dense run in fewer steps, and the candidates in all steps that no other of them beats everywhere, since
    a patch does not choose the number of steps; no other that may be chosen either, of those that may.

    Parameters
    ----------
    settings : mapping of (str, int) to Setting
    losses : mapping of (str, int) to Losses
        Of all of them.
    base : int
        Steps of the dense run.
    """
    behind = _behind({key: setting for key, setting in settings.items() if key in losses}, losses, base)
    patched = {key: settings[key] for key in behind if key[1] == base and key[0] in CANDIDATES}
    chosen = {key: setting for key, setting in patched.items() if not held_back(CANDIDATES[key[0]])}
    always = {key for own in (patched, chosen) for key, lost in _behind(own, losses, base).items() if min(lost) <= 0}
    always |= {key for key in behind if key[0] == DENSE}
    others = sorted(behind.keys() - always, key=lambda key: (min(behind[key]), fmean(behind[key]), key))
    return {*always, *others[: max(0, -(-len(behind) // 2) - len(always))]}


def _behind(settings: Mapping[Key, Setting], losses: Mapping[Key, Losses], base: int) -> dict[Key, list[float]]:
    """How far each setting is behind the best of them that is as fast, in dB, at all sizes and in both measures."""
    behind: dict[Key, list[float]] = {}
    for model, references in GEOMETRIES:
        speed = {key: setting.flop_ratio(base, model, references) for key, setting in settings.items()}
        for measure in ("subject", "picture"):
            worst = {key: value for key in settings if (value := losses[key].worst(measure, references)) is not None}
            for key, value in worst.items():
                best = max(other for each, other in worst.items() if speed[each] >= speed[key] - 1e-9)
                behind.setdefault(key, []).append(best - value)
    return behind
