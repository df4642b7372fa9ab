"""The curve of a run, and its progress bar."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ..errors import VersionError
from ..files import replacing

__all__ = ["Log", "progress"]


def progress(start: int, steps: int) -> Any:
    """A progress bar, on the first process alone."""
    try:
        from accelerate.utils import tqdm
    except ImportError as error:
        raise VersionError("training needs accelerate: pip install 'sparse-ref-attn[train]'") from error
    return tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)


class Log:
    """``log.csv``: one row a step. Rows after the checkpoint that a run continues from are dropped."""

    def __init__(self, out: Path, start: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "log.csv"
        self.rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Keep one row."""
        self.rows.append({"step": str(step)} | {name: f"{number:.6g}" for name, number in numbers.items()})

    def write(self) -> None:
        """Write all rows, in the place of the old ones; ConfigError on a full disk."""
        with replacing(self.path) as draft, open(draft, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[-1]))
            writer.writeheader()
            writer.writerows(self.rows)
