"""Rows of results: appended as they come, by any number of processes, none lost and none double."""

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

__all__ = ["KEY", "Key", "RowStore", "Rows", "read_rows", "written"]

KEY = ("model", "family", "example", "seed", "method", "keep")
"""Columns that tell one picture from all others."""

Key = tuple[str, ...]
Row = dict[str, str]


class Rows:
    """One CSV that rows are appended to, whole lines, and that says which are there.

    Parameters
    ----------
    path : Path
        Made with the first row, folders too. What a killed process left of a last line is cut off before another.
    columns : sequence of str
    keys : sequence of str
        Of the columns, those that tell a row from all others.
    digits : int
        Of a number that is no whole one.

    Raises
    ------
    ConfigError
        If the file has other columns, or the disk is full.
    ValueError
        For a row with a value without a column.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> rows = Rows(Path(folder.name) / "rows.csv", ["cup", "PSNR (dB)"], keys=["cup"])
    >>> rows.add([{"cup": 1, "PSNR (dB)": 64 / 3}, {"cup": 2}])
    >>> rows.read(), rows.has({"cup": 2}), rows.has({"cup": 3})
    ([{'cup': '1', 'PSNR (dB)': '21.3333'}, {'cup': '2', 'PSNR (dB)': ''}], True, False)
    >>> folder.cleanup()
    """

    def __init__(self, path: Path, columns: Sequence[str], *, keys: Sequence[str] = (), digits: int = 6) -> None:
        self.path, self.columns, self.keys, self._digits = path, tuple(columns), tuple(keys), digits
        self._known = {tuple(row[name] for name in self.keys) for row in self.read()}
        self._begun = False

    def read(self) -> list[Row]:
        """The whole lines of the file; none where there is no file."""
        return _read(self.path, self.columns)

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a row of this key."""
        return tuple(written(key[name], self._digits) for name in self.keys) in self._known

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, all or, if the process is killed, the first of them; a column that a row lacks stays empty."""
        for row in rows:
            if unknown := [name for name in row if name not in self.columns]:
                raise ValueError(f"a row must have no values but {', '.join(self.columns)}, got {', '.join(unknown)}")
        lines = [[written(row.get(name), self._digits) for name in self.columns] for row in rows]
        with fits("the rows", self.path.parent):
            if not self._begun:
                self._begin()
            with self.path.open("ab") as file:
                file.write("".join(map(_line, lines)).encode())
        self._known |= {tuple(dict(zip(self.columns, line, strict=True))[name] for name in self.keys) for line in lines}

    def _begin(self) -> None:
        """Make the file with its header, or cut off what is no whole line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            whole = _whole(file.read())
            file.truncate(whole)
            if not whole:
                file.write(_line(self.columns).encode())
        self._begun = True


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
        self._part: Rows | None = None

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
        if self._part is None:
            self._part = Rows(self.folder / f"rows.part-{process}.csv", self.columns)
        self._part.add([{**row, **{name: str(row[name]) for name in KEY}} for row in rows])

    def merge(self) -> list[Row]:
        """Put all parts into ``rows.csv``; the rows, in order."""
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

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("rows.part-*.csv"))

    def _all(self) -> list[Row]:
        found: dict[Key, Row] = {}
        for path in (self.folder / "rows.csv", *self._parts()):
            for row in _read(path, self.columns):
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
    """The whole lines of a file, which need not be there."""
    found = path.read_bytes() if path.exists() else b""
    text = found[: _whole(found)].decode("utf-8")
    lines = list(csv.reader(io.StringIO(text, newline="")))
    if lines and tuple(lines[0]) != columns:
        raise ConfigError(f"{path} must have the columns {', '.join(columns)}, got {', '.join(lines[0])}")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def _whole(found: bytes) -> int:
    """How many bytes are whole lines."""
    return found.rfind(b"\n") + 1


def _order(row: Row) -> tuple[Any, ...]:
    return row["model"], row["family"], row["example"], int(row["seed"]), row["method"], -float(row["keep"])


def _line(values: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def written(value: Any, digits: int) -> str:
    """A value as a CSV has it.

    Examples
    --------
    >>> written(2 / 3, 4), written(3, 4), written(None, 4)
    ('0.6667', '3', '')
    """
    return "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)
