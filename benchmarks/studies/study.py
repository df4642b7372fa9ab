"""What a study is: measurements of every subject and seed, and the rows that each of them gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ref_attn.eval.rows import Rows

from .generator import Generator

__all__ = ["DIGITS", "Generators", "Measurement", "Study"]

DIGITS = 5
"""Of every number in the studies' rows."""

Generators = Mapping[str, Generator]
"""By the models' names in the rows."""


@dataclass(frozen=True)
class Measurement:
    """Rows that are measured together.

    Parameters
    ----------
    key : mapping
        Of the last of them: where it is there, all are.
    rows : callable
        Measures them.
    """

    key: Mapping[str, Any]
    rows: Callable[[], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Study:
    """Measurements that are made once, and again only where their rows are not there.

    Parameters
    ----------
    keys, values : tuple of str
        Columns that say what was measured, and columns of what it gave.
    of : callable
        (generators, subject, seed) to the measurements of a subject and seed.
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]
    of: Callable[[Generators, int, int], Iterable[Measurement]]

    def measure(
        self,
        path: Path,
        generators: Generators,
        subjects: int,
        seeds: int,
        tell: Callable[[int, int], Any] = lambda done, of: None,
    ) -> None:
        """Measure what is missing in a CSV, subject after subject."""
        rows = Rows(path, (*self.keys, *self.values), keys=self.keys, digits=DIGITS)
        for subject in range(subjects):
            for seed in range(seeds):
                for measurement in self.of(generators, subject, seed):
                    if not rows.has(measurement.key):
                        rows.add(measurement.rows())
                for generator in generators.values():
                    generator.forget()
                tell(subject * seeds + seed + 1, subjects * seeds)
