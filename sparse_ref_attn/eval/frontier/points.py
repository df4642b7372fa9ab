"""Rows of a sweep as what each setting loses, and as the points that ``assets/frontier.csv`` holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from ...candidates import CANDIDATES, DENSE
from ...frontier import Point
from ...vocabulary import OPEN_SCENERY
from ..aggregate import Values, combined, interval
from ..examples import Examples
from ..metrics import Interval, SceneryContrast
from .listed import Key, setting_of

__all__ = ["Group", "Losses", "Lost", "losses_of", "points_of"]

Group = tuple[str, int]
"""Kind of edit, and how many references it has."""

SUBJECT, PICTURE = "subject PSNR (dB) vs target", "PSNR (dB) vs dense"
Row = Mapping[str, str]


@dataclass(frozen=True)
class Lost:
    """What a setting loses on one group.

    Parameters
    ----------
    loss : Interval, optional
        Paired difference to the dense run in dB, below 0 where something is lost: of the subject's PSNR against the
        right answer, or of the contrast of scenery that was left open.
    picture : float, optional
        PSNR of the picture against the dense one, mean over pictures, in dB.
    examples, seeds : int
    """

    loss: Interval | None
    picture: float | None
    examples: int
    seeds: int


@dataclass(frozen=True)
class Losses:
    """What a setting loses, by group."""

    groups: Mapping[Group, Lost]

    def worst(self, measure: str, references: int) -> float | None:
        """The lowest of the groups with so many references, or with the most that there are below it.

        Parameters
        ----------
        measure : {"subject", "picture"}
            The mean of `Lost.loss`, or `Lost.picture`.
        references : int
        """
        there = {count for _, count in self.groups if count <= references}
        values = [
            lost.picture if measure == "picture" else None if lost.loss is None else lost.loss.mean
            for (_, count), lost in self.groups.items()
            if there and count == max(there)
        ]
        return min((value for value in values if value is not None), default=None)


def losses_of(rows: Sequence[Row], data: Examples, model: str, base: int) -> dict[Key, Losses]:
    """What each setting of a sweep loses, on the examples that it was run on.

    Parameters
    ----------
    rows : sequence of mapping
        As `sweep` writes them.
    data : Examples
    model : str
        By its name in the rows.
    base : int
        Steps of the dense run.
    """
    places = {name: place for place, (name, _) in enumerate(data.keys)}
    own = [row for row in rows if row["model"] == model]
    counts = {name: len(data[places[name]].references) for name in {row["example"] for row in own}}
    cells: dict[tuple[Key, Group], list[Row]] = {}
    for row in own:
        key = row["method"], round(float(row["keep"]) * base)
        cells.setdefault((key, (row["family"], counts[row["example"]])), []).append(row)
    found: dict[Key, dict[Group, Lost]] = {}
    for (key, group), these in cells.items():
        if key != (DENSE, base):
            found.setdefault(key, {})[group] = _lost(these, cells.get(((DENSE, base), group), []))
    return {key: Losses(dict(sorted(groups.items()))) for key, groups in found.items()}


def _lost(rows: Sequence[Row], dense: Sequence[Row]) -> Lost:
    of = _contrast if rows[0]["family"] == OPEN_SCENERY else partial(_values, measure=SUBJECT)
    both = combined([(1.0, of(rows)), (-1.0, of(dense))])
    pictures = _values(rows, PICTURE)
    seeds = len({row["seed"] for row in rows})
    return Lost(
        interval(both)[0] if both else None,
        fmean(pictures.values()) if pictures else None,
        len({row["example"] for row in rows}),
        seeds,
    )


def _contrast(rows: Sequence[Row]) -> Values:
    """In dB."""
    return {key: 20 * math.log10(value) for key, value in _values(rows, SceneryContrast.name).items() if value > 0}


def _values(rows: Sequence[Row], measure: str) -> Values:
    found = {(row["example"], row["seed"]): float(row[measure]) for row in rows if row.get(measure)}
    return {key: value for key, value in found.items() if abs(value) != float("inf")}


def points_of(losses: Mapping[Key, Losses], base: int, weights: str) -> Iterator[Point]:
    """The points, in the order of the candidates, those of the most steps first.

    Parameters
    ----------
    losses : mapping of (str, int) to Losses
    base : int
        Steps of the dense run.
    weights : str
        Hash of the model's weights.
    """
    order = {key: place for place, key in enumerate([DENSE, *CANDIDATES])}
    for key, steps in sorted(losses, key=lambda each: (order.get(each[0], len(order)), each[0], -each[1])):
        setting = setting_of(key, steps if steps < base else None)
        assert setting is not None
        for (family, references), lost in losses[key, steps].groups.items():
            loss, low, high = (None,) * 3 if lost.loss is None else (round(value, 3) for value in lost.loss)
            yield Point(
                setting=key,
                code="; ".join(setting.code.split("\n")),
                family=family,
                references=references,
                base_steps=base,
                steps=steps,
                loss_db=loss,
                low=low,
                high=high,
                dense_db=None if lost.picture is None else round(lost.picture, 2),
                examples=lost.examples,
                seeds=lost.seeds,
                weights=weights,
            )
