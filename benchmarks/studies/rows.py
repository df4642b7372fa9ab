"""The CSV of one study: what is in it already is not measured again."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Rows"]


class Rows:
    """Rows on the disk, each known by some of its columns.

    Parameters
    ----------
    path : Path
        Made with a header if it is not there; a last line that a killed run left unfinished is cut off.
    keys, values : sequence of str
        Columns that say what was measured, and columns of what it gave.

    Raises
    ------
    ValueError
        If the file has other columns.
    """

    def __init__(self, path: Path, keys: Sequence[str], values: Sequence[str]) -> None:
        self.path, self.keys, self.columns = path, tuple(keys), (*keys, *values)
        self._known: set[tuple[str, ...]] = set()
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole, encoding="utf-8")
            reader = csv.DictReader(whole.splitlines())
            if tuple(reader.fieldnames or ()) != self.columns:
                raise ValueError(f"{path} must have the columns {', '.join(self.columns)}, got {reader.fieldnames}")
            self._known = {tuple(row[k] for k in self.keys) for row in reader}
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(",".join(self.columns) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._known)

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a row of this key."""
        return self._key(key) in self._known

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, all on the disk or none but the last unfinished line."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)
        self._known |= {self._key(row) for row in rows}

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(_text(row[name]) for name in self.keys)


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)
