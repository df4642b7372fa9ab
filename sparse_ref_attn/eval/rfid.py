"""rFID of an evaluation: of the pictures that each method made, against those of every token."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from ..files import replacing
from ..pictures import open_image
from .metrics import InceptionFeatures, frechet_distance

__all__ = ["Rfid", "rfid_of_folder", "rfid_table", "write_rfid"]

_BASE = "dense 1"


@dataclass(frozen=True)
class Rfid:
    """A line of ``rfid.csv``.

    Parameters
    ----------
    model, method : str
    keep : float
    pictures : int
        In each of both sets: those of the examples whose pictures of the method, and of every token, are kept.
    rfid : float
        Squared Fréchet distance of their Inception features.
    """

    model: str
    method: str
    keep: float
    pictures: int
    rfid: float


def rfid_of_folder(folder: Path) -> list[Rfid]:
    """Of the pictures that `evaluate` kept in ``pictures/MODEL/EXAMPLE``.

    Raises
    ------
    ConfigError
        If no method has two pictures there, or the weights are not installed.
    """
    see = InceptionFeatures()
    found = []
    for model in sorted(path for path in (folder / "pictures").glob("*") if path.is_dir()):
        seen: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for path in sorted(model.glob("*/*.png")):
            if (path.parent / f"{_BASE}.png").is_file():
                seen[path.stem][path.parent.name] = see([open_image(path)])[0]
        dense = seen.pop(_BASE, {})
        for cell, own in seen.items():
            if len(own) > 1:
                method, _, keep = cell.rpartition(" ")
                both = (torch.stack([features[name] for name in own]) for features in (own, dense))
                found.append(Rfid(model.name, method, float(keep), len(own), frechet_distance(*both)))
    if not found:
        raise ConfigError(f"rFID must have two pictures or more of a method and of every token, got none in {folder}")
    return sorted(found, key=lambda line: (line.model, line.method, -line.keep))


def rfid_table(lines: Sequence[Rfid]) -> str:
    """As Markdown.

    Examples
    --------
    >>> print(rfid_table([Rfid("small", "grid", 0.25, 64, 12.345)]))
    | model | method | keep | pictures | rFID |
    |---|---|--:|--:|--:|
    | small | grid | 25 % | 64 | 12.3 |
    """
    rows = [f"| {x.model} | {x.method} | {100 * x.keep:.3g} % | {x.pictures} | {x.rfid:.3g} |" for x in lines]
    return "\n".join(["| model | method | keep | pictures | rFID |", "|---|---|--:|--:|--:|", *rows])


def write_rfid(path: Path, lines: Sequence[Rfid]) -> None:
    """All lines as CSV."""
    with replacing(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Rfid)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(line), "rfid": f"{line.rfid:.6g}"} for line in lines)
