"""The rows of an evaluation: appended as they come, by any number of processes, none lost and none double."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..errors import ConfigError
from ..files import fits, replacing

__all__ = ["KEY", "Key", "RowStore", "read_rows"]

KEY = ("model", "family", "example", "seed", "method", "keep")
"""Columns that tell one picture from all others."""

Key = tuple[str, ...]
Row = dict[str, str]


class RowStore:
    """``rows.csv`` of a folder, and the parts that running processes append to.

    A row is one line, written at once: a process that is killed leaves at most the beginning of a line, which is not
    read. Metrics have six digits. `merge` makes one file of all parts, in an order that does not depend on who made
    which row.

    Parameters
    ----------
    folder : Path
    columns : sequence of str
        After those of `KEY`.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> store = RowStore(Path(folder.name), ["PSNR (dB)"])
    >>> row = dict(zip(KEY, ("a", "f", "cup", 0, "edges", 0.25)))
    >>> store.append(0, [{**row, "PSNR (dB)": 21.5}])
    >>> [row["PSNR (dB)"] for row in store.merge()], [path.name for path in Path(folder.name).iterdir()]
    (['21.5'], ['rows.csv'])
    >>> folder.cleanup()
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self.folder, self.columns = folder, (*KEY, *columns)
        self._lock: TextIO | None = None
        self._part: TextIO | None = None

    def lock(self) -> None:
        """Keep other runs out of the folder until this process ends.

        Raises
        ------
        ConfigError
            If another run holds it.
        """
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"one run at a time must write to a folder, got another at work in {self.folder}"
            ) from error

    def keys(self) -> set[Key]:
        """Of all rows there are."""
        return {tuple(row[name] for name in KEY) for row in self._all()}

    def append(self, process: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of one process, all or, if it is killed, the first of them."""
        with fits("the rows", self.folder):
            if self._part is None:
                path = self.folder / f"rows.part-{process}.csv"
                new = not path.exists() or path.stat().st_size == 0
                self._part = path.open("a", newline="", encoding="utf-8")
                if new:
                    self._part.write(_line(self.columns))
            self._part.write("".join(_line(self._texts(row)) for row in rows))
            self._part.flush()

    def merge(self) -> list[Row]:
        """Put all parts into ``rows.csv``; the rows, in order."""
        if self._part is not None:
            self._part.close()
            self._part = None
        rows = sorted(self._all(), key=_order)
        with replacing(self.folder / "rows.csv") as draft, open(draft, "w", newline="", encoding="utf-8") as file:
            file.write(_line(self.columns))
            file.writelines(_line([row[name] for name in self.columns]) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        for part in self._parts():
            part.unlink()
        return rows

    def _texts(self, row: Mapping[str, Any]) -> list[str]:
        return [str(row[name]) if name in KEY else _text(row[name]) for name in self.columns]

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("rows.part-*.csv"))

    def _all(self) -> list[Row]:
        found: dict[Key, Row] = {}
        for path in (self.folder / "rows.csv", *self._parts()):
            for row in _read(path, self.columns) if path.exists() else ():
                found.setdefault(tuple(row[name] for name in KEY), row)
        return list(found.values())


def read_rows(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The header (``eval.json``) and the rows of a finished or killed run.

    Raises
    ------
    ConfigError
        If the folder holds none.
    """
    header = folder / "eval.json"
    if not header.is_file():
        raise ConfigError(f"a folder of results must hold eval.json, got {folder}")
    about = json.loads(header.read_text(encoding="utf-8"))
    return about, sorted(RowStore(folder, list(about["settings"]["columns"]))._all(), key=_order)


def _read(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """The whole lines of a file."""
    written = path.read_bytes()
    text = written[: written.rfind(b"\n") + 1].decode("utf-8")
    lines = list(csv.reader(io.StringIO(text, newline="")))
    if lines and tuple(lines[0]) != columns:
        raise ConfigError(f"{path} must have the columns {', '.join(columns)}, got {', '.join(lines[0])}")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def _order(row: Row) -> tuple[Any, ...]:
    return row["model"], row["family"], row["example"], int(row["seed"]), row["method"], -float(row["keep"])


def _line(values: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
