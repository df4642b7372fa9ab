"""Has anything got slower? Fresh rows beside the committed ones, by ratios that do not depend on the machine's speed.

Seconds of two machines cannot be compared; how near a method comes to its bound can, and so can ours over the same call
written by hand.

    python -m benchmarks check fresh/pipeline_cpu.csv     # beside benchmarks/results/pipeline_cpu.csv
    python -m benchmarks pipeline --check                 # the same right after measuring

A row is compared with the latest committed row of the same call, on the same device if there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ref_attn.errors import ConfigError

from . import results

__all__ = ["RATIOS", "TOLERANCE", "Comparison", "add_arguments", "compare", "run"]

RATIOS = ("measured_over_bound", "of_bound", "of_hand")
"""Columns that are compared; higher is better in all of them."""

TOLERANCE = 0.10
"""A ratio may fall by this share of the committed one."""

WHICH = (
    "level", "op", "direction", "model", "width", "heads", "depth", "steps", "references", "rows", "side", "batch",
    "share", "kept", "method", "dtype",
)  # fmt: skip
"""Columns that say which call a row is of; those that a row does not have are empty."""


@dataclass(frozen=True)
class Comparison:
    """What was compared, in words.

    Parameters
    ----------
    compared : int
        Ratios that have a committed counterpart.
    alone : int
        Fresh rows without one.
    slower : tuple of str
        One line a ratio that fell by more than the tolerance.
    tolerance : float
    """

    compared: int
    alone: int
    slower: tuple[str, ...]
    tolerance: float

    @property
    def exit_code(self) -> int:
        """0 when nothing is slower; 1 when something is, or nothing could be compared."""
        return int(bool(self.slower) or not self.compared)

    def report(self) -> str:
        """Every regression, and how much was compared."""
        if not self.compared:
            return f"nothing could be compared: none of {self.alone} rows has a committed row of the same call"
        lines = [f"slower: {line}" for line in self.slower]
        lines.append(
            f"{self.compared} ratios compared with the committed rows, {len(self.slower)} fell by more than "
            f"{self.tolerance:.0%}; {self.alone} rows have no committed row"
        )
        return "\n".join(lines)


def compare(
    fresh: Iterable[Mapping[str, Any]], committed: Sequence[Mapping[str, Any]], tolerance: float = TOLERANCE
) -> Comparison:
    """Compare each fresh row's ratios with the committed row of the same call.

    Parameters
    ----------
    fresh, committed : sequences of mapping
        Rows as they are measured or as `results.read` gives them, oldest first.
    tolerance : float
        In [0, 1): a ratio under ``(1 - tolerance)`` times the committed one is a regression.

    Raises
    ------
    ConfigError
        If the tolerance is outside its range.

    Examples
    --------
    >>> old = {"model": "m", "method": "edges 25%", "device": "d", "measured_over_bound": "1.00"}
    >>> compare([old | {"measured_over_bound": 0.8}], [old]).slower
    ('m, edges 25%: measured_over_bound 0.80, committed 1.00 (-20%)',)
    """
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance must lie in [0, 1), got {tolerance}")
    latest: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for row in committed:
        for key in (_call(row), (*_call(row), str(row["device"]))):
            latest[key] = row
    compared, alone, slower = 0, 0, []
    for row in fresh:
        call = _call(row)
        old = latest.get((*call, str(row["device"])), latest.get(call))
        if old is None:
            alone += 1
            continue
        for name in RATIOS:
            if row.get(name) in (None, "") or old.get(name) in (None, ""):
                continue
            compared += 1
            now, before = float(row[name]), float(old[name])
            if not now >= (1 - tolerance) * before:  # nan is no pass
                what = ", ".join(part for part in call if part)
                slower.append(f"{what}: {name} {now:.2f}, committed {before:.2f} ({now / before - 1:+.0%})")
    return Comparison(compared, alone, tuple(slower), tolerance)


def _call(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Numbers as the CSV writes them, so that a fresh row meets the one it was read back as."""
    values = ("" if row.get(name) is None else row[name] for name in WHICH)
    return tuple(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files of fresh rows, and what they are compared with."""
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV", help="fresh rows")
    parser.add_argument(
        "--against", type=Path, default=results.RESULTS, metavar="DIR",
        help="where the file of the same name has the committed rows (default: benchmarks/results)",
    )  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Every file; 1 if a ratio fell in any of them, or nothing could be compared."""
    code = 0
    for path in options.files:
        committed = options.against / path.name
        for file in (path, committed):
            if not file.is_file():
                raise ConfigError(f"rows must be in a CSV file, got {file}, which does not exist")
        if path.samefile(committed):
            raise ConfigError(f"fresh rows must be in a file of their own, got {path}, which has the committed ones")
        found = compare(results.read(path), results.read(committed), options.tolerance)
        print(f"{path.name}: {found.report()}")
        code = max(code, found.exit_code)
    return code
