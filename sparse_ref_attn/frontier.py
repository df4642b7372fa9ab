"""What settings lose on the small model: the rows of ``assets/frontier.csv``, read in one place."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from .errors import ConfigError
from .vocabulary import OPEN_SCENERY

__all__ = ["FRONTIER", "Loss", "Point", "loss_of", "read_points", "write_points"]

FRONTIER = Path(__file__).parent / "assets" / "frontier.csv"


@dataclass(frozen=True)
class Point:
    """A setting on one family of edits: a row.

    Parameters
    ----------
    setting : str
        A key of `candidates.CANDIDATES`, `candidates.DENSE`, or another name, which nothing is chosen from.
    code : str
        What a user copies.
    family : str
        The kind of edit.
    references : int
        Of each edit.
    base_steps, steps : int
        Of the dense run that it is compared with, and its own.
    loss_db, low, high : float or None
        Subject's PSNR against the right answer, less that of the base, and its paired 95 % interval, in dB: below 0
        where something was lost. In the family "open scenery" the same of the scenery's contrast. None where neither
        was measured.
    dense_db : float or None
        PSNR of the picture against the base's, in dB.
    examples, seeds : int
        Subjects, and the most seeds of one.
    weights : str
        Hash of the small model's weights.
    """

    setting: str
    code: str
    family: str
    references: int
    base_steps: int
    steps: int
    loss_db: float | None
    low: float | None
    high: float | None
    dense_db: float | None
    examples: int
    seeds: int
    weights: str


@dataclass(frozen=True)
class Loss:
    """What a setting loses in the worst of the families with one right answer, and of open scenery beside them.

    Parameters
    ----------
    db, low, high : float
        As `Point.loss_db`, each the lowest of the families.
    dense_db : float or None
        As in `Point`, the lowest of the families.
    base_steps, steps : int
        Of the rows that it comes from.
    open_db : float, optional
        Contrast of open scenery, less that of the base: below 0 where less of it was drawn. None where it was not
        measured.

    Examples
    --------
    >>> Loss(-0.66, -1.02, -0.33, 28.4, 12, 12).words
    '-0.7 dB [-1.0, -0.3], 28.4 dB to the dense picture'
    """

    db: float
    low: float
    high: float
    dense_db: float | None
    base_steps: int
    steps: int
    open_db: float | None = None

    @property
    def words(self) -> str:
        """For tables and summaries."""
        picture = "" if self.dense_db is None else f", {self.dense_db:.1f} dB to the dense picture"
        scenery = "" if self.open_db is None else f", contrast of open scenery {self.open_db:+.1f} dB"
        return f"{self.db:+.1f} dB [{self.low:+.1f}, {self.high:+.1f}]{picture}{scenery}"


@cache
def read_points(path: Path = FRONTIER) -> tuple[Point, ...]:
    """Every row.

    Raises
    ------
    ConfigError
        If the file has not the columns of `Point`, or a number cannot be read.

    Examples
    --------
    >>> {point.base_steps for point in read_points() if point.setting == "stored-halves"}
    {12}
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = [field.name for field in fields(Point) if field.name not in (rows.fieldnames or ())]
        if missing:
            raise ConfigError(f"{path} must have the columns of a frontier, got none named {', '.join(missing)}")
        return tuple(_point(row, path, line) for line, row in enumerate(rows, 2))


def _point(row: dict[str, str], path: Path, line: int) -> Point:
    interval = [row[name] for name in ("loss_db", "low", "high")]
    try:
        if any(interval) != all(interval):
            raise ValueError("a loss without its interval")
        loss, low, high = (_number(text) for text in interval)
        return Point(
            row["setting"], row["code"], row["family"], int(row["references"]), int(row["base_steps"]),
            int(row["steps"]), loss, low, high, _number(row["dense_db"]), int(row["examples"]),
            int(row["seeds"]), row["weights"],
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"{path}, line {line}, must hold numbers of a frontier, got {row}") from error


def _number(text: str) -> float | None:
    return float(text) if text else None


def write_points(points: Iterable[Point], path: Path) -> None:
    """The file that `read_points` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def loss_of(points: Iterable[Point], setting: str, steps: int, own_steps: int | None = None) -> Loss | None:
    """What is known of a setting; None where it was not measured.

    Parameters
    ----------
    points : iterable of Point
    setting : str
    steps : int
        Of the caller's dense run: rows of the nearest number answer.
    own_steps : int, optional
        Where they are fewer: rows of the nearest share of the steps answer.

    Examples
    --------
    >>> found = loss_of(read_points(), "stored-once", 28)
    >>> found.steps, found.base_steps, found.db < 0, found.dense_db < 30
    (12, 12, True, True)
    >>> found = loss_of(read_points(), "dense", 28, 9)
    >>> found.steps, found.base_steps
    (4, 12)
    """
    own = [p for p in points if p.setting == setting and p.loss_db is not None]
    rows = _rows_for([p for p in own if p.family != OPEN_SCENERY], steps, own_steps)
    if not rows:
        return None
    scenery = _rows_for([p for p in own if p.family == OPEN_SCENERY], steps, own_steps)
    db, low, high = (min(getattr(p, name) for p in rows) for name in ("loss_db", "low", "high"))
    return Loss(
        db,
        low,
        high,
        dense_db=min((p.dense_db for p in rows if p.dense_db is not None), default=None),
        base_steps=rows[0].base_steps,
        steps=rows[0].steps,
        open_db=min((p.loss_db for p in scenery if p.loss_db is not None), default=None),
    )


def _rows_for(points: Iterable[Point], steps: int, own_steps: int | None) -> list[Point]:
    """Those nearest to a run of `steps` steps, or of `own_steps` of them."""
    fewer = own_steps is not None and own_steps < steps
    rows = [p for p in points if (p.steps < p.base_steps) == fewer]
    rows = _nearest(rows, [p.base_steps / steps for p in rows])
    if own_steps is not None and fewer:
        rows = _nearest(rows, [p.steps / p.base_steps * steps / own_steps for p in rows])
    return rows


def _nearest(rows: list[Point], ratios: list[float]) -> list[Point]:
    """Those whose ratio is nearest to 1."""
    far = [abs(math.log(ratio)) for ratio in ratios]
    return [row for row, distance in zip(rows, far, strict=True) if math.isclose(distance, min(far), abs_tol=1e-9)]
