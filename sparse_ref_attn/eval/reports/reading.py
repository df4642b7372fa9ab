"""Documents that others made, read again: checked whole, and each run of each as one point."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .schema import check

__all__ = ["Point", "SharedReport", "read_shared"]


@dataclass(frozen=True)
class Point:
    """One way to run one call, beside its dense run.

    Parameters
    ----------
    report : str
        Name of the file.
    model : str
        Hub id, or the class of the pipeline.
    references, steps : int
    method : str
    kind : {"sparse", "fewer steps", "other"}
        A method of this library, the dense pipeline in fewer steps, or another rival.
    seconds, speedup : float
        Of the whole call, median; dense seconds over these.
    bound_speedup, flop_ratio : float, optional
        The speed-up if nothing were lost; dense work of the transformer over the work that was done.
    drift : float, optional
        How far stored keys and values had moved at most, over all full steps and layers; None where none are stored.
    metrics : dict of str to float, optional
        Against the dense picture. None is a PSNR without end: the pictures are equal.
    """

    report: str
    model: str
    references: int
    steps: int
    method: str
    kind: str
    seconds: float
    speedup: float
    bound_speedup: float | None
    flop_ratio: float | None
    drift: float | None
    metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedReport:
    """A comparison that was measured somewhere.

    Parameters
    ----------
    path : Path
    document : dict
        As the schema has it; what has no property here is read from it.
    """

    path: Path
    document: dict[str, Any] = field(repr=False)

    @property
    def about(self) -> dict[str, Any]:
        """Model, device, settings and versions."""
        found: dict[str, Any] = self.document["about"]
        return found

    @property
    def model(self) -> str:
        """Hub id, or the class of the pipeline where the file does not say more."""
        return str(self.about["model"] or self.about["pipeline"])

    @property
    def metrics(self) -> dict[str, bool]:
        """Names of the metrics, and whether higher is better."""
        return {each["name"]: each["higher_is_better"] for each in self.document["metrics"]}

    @property
    def dense_seconds(self) -> float:
        """Of the whole dense call, median."""
        return float(self.document["rows"][0]["seconds"])

    @property
    def fewer_steps_win(self) -> list[str]:
        """Methods that fewer steps beat: nearer to the dense picture by PSNR, in no more time."""
        return list(self.document.get("rivals", {"fewer_steps_win": ()})["fewer_steps_win"])

    def points(self) -> list[Point]:
        """Every run but the dense one, the longest first."""
        about, runs = self.about, self.document["runs"]
        found = [
            Point(
                self.path.name,
                self.model,
                len(about["references"]),
                row.get("steps", about["arguments"]["steps"]),
                row["method"],
                self._kind(row["method"]),
                row["seconds"],
                row["speedup"],
                row["bound_speedup"],
                row["flop_ratio"],
                _drift(runs.get(row["method"])),
                {name: row.get(name) for name in self.metrics},
            )
            for row in self.document["rows"][1:]
        ]
        return sorted(found, key=lambda point: -point.seconds)

    def _kind(self, method: str) -> str:
        rivals = self.document.get("rivals", {"runs": (), "at_equal_time": {}})
        if method not in rivals["runs"]:
            return "sparse"
        return "fewer steps" if method in rivals["at_equal_time"].values() else "other"


def read_shared(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[SharedReport]:
    """Read what ``sra compare --share`` wrote, here or elsewhere; ``compare.json`` and ``report.json`` too.

    Parameters
    ----------
    paths : path, or iterable of paths
        Files, and folders whose ``*.json`` are meant.

    Returns
    -------
    list of SharedReport
        In the order of `paths`, the files of a folder by name; a measurement that was given twice is there once.

    Raises
    ------
    ConfigError
        If a file cannot be read or breaks the schema, or is of a newer version than this library knows; it says
        which file, and where in it. If there is no file.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.cli import main
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> main(["compare", "--out", str(folder / "page"), "--builtin", "tiny", "--steps", "2", "--methods", "edges",
    ...     "--share", str(folder / "mine.json")])  # doctest: +ELLIPSIS
    <BLANKLINE>
    ...
    0
    >>> (report,) = sra.read_shared(folder / "mine.json")
    >>> [(point.method, point.references, point.steps) for point in report.points() if point.kind == "sparse"]
    [('edges', 1, 2)]
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = [file for path in given for file in _files(Path(path))]
    if not files:
        raise ConfigError(f"reports must be given as files, or as folders that hold them, got {given!r}")
    found: dict[str, SharedReport] = {}
    for file in files:
        document = _document(file)
        measured = {name: each for name, each in document.items() if name not in ("shared", "about")}
        found.setdefault(json.dumps(measured, sort_keys=True), SharedReport(file, document))
    return list(found.values())


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.json")) if path.is_dir() else [path]


def _document(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"a report must be a readable JSON file, got {file}: {error}") from error
    check(found, str(file))
    document: dict[str, Any] = found
    return document


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _drift(run: Mapping[str, Any] | None) -> float | None:
    """The worst that a run's stored keys and values had moved."""
    stored = None if run is None else run["run"]["cache"]
    moved = [each["worst"] for each in (stored or {"drift": []})["drift"] if each["worst"] is not None]
    return max(moved, default=None)
