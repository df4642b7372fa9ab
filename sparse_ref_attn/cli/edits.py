"""What ``sra run`` is to make: one edit, a folder of pictures, or a JSON-lines file, as a list of `Edit`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..metadata import read_lines
from ..pictures import check_image
from ..vocabulary import near
from . import values
from .recorded import FORMATS, check_place

__all__ = ["Edit", "edits_of"]

_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_LINES = ".jsonl"
_SEEDS = 2**64


@dataclass(frozen=True)
class Edit:
    """One picture to make.

    Parameters
    ----------
    images : tuple of Path
        The references.
    prompt : str
    out : Path
        The picture's file.
    seed : int
    negative : str, optional
    guidance : float, optional
    steps, width, height : int, optional
        Default the pipeline's.
    """

    images: tuple[Path, ...]
    prompt: str
    out: Path
    seed: int
    negative: str | None = None
    guidance: float | None = None
    steps: int | None = None
    width: int | None = None
    height: int | None = None

    @property
    def dense(self) -> Path:
        """Where the dense picture goes."""
        return self.out.with_stem(f"{self.out.stem}-dense")


FIELDS: dict[str, Callable[[str], Any]] = {
    "guidance": values.at_least_zero,
    "steps": values.above(1),
    "seed": values.seed,
    "width": values.above(16),
    "height": values.above(16),
    "num_images": values.above(1),
}
"""What a line of a JSON-lines file may say for itself beside its texts, as the arguments of the same name."""
_TEXTS = ("prompt", "negative", "out")
_IMAGE = "image"


def edits_of(options: argparse.Namespace) -> tuple[list[Edit], bool]:
    """The pictures to make, each with a file of its own, and whether they are many edits rather than one.

    Parameters
    ----------
    options : argparse.Namespace
        Of ``sra run``.

    Raises
    ------
    ConfigError
        For whatever can be known to fail without a model: references that are no pictures, outputs that cannot be
        written, would replace a reference or somebody else's file, or share a name.
    """
    images = [*options.images, *(options.image or ())]
    if not images:
        raise ConfigError("an image must be given, a folder or a .jsonl file of edits, got none (sra run --help)")
    first, out = Path(images[0]), Path(options.out)
    many = [path for path in images if Path(path).is_dir() or Path(path).suffix.lower() == _LINES]
    if many and len(images) > 1:
        others = ", ".join(path for path in images if path != many[0])
        raise ConfigError(f"a folder or a JSON-lines file must stand alone, got {many[0]} beside {others}")
    if many:
        if out.suffix.lower() in FORMATS and not out.is_dir():
            raise ConfigError(f"the output of many edits must be a folder, got {out}, which is named like a picture")
        if out.is_dir() and first.is_dir() and out.samefile(first):
            raise ConfigError(f"the output must be another folder than that of the references, got {out} for both")
        lines = _folder(first) if first.is_dir() else _lines(first)
        edits = [edit for where, line in lines for edit in _edits(line, where, out, options)]
    else:
        edits = _edits({_IMAGE: images}, "", out, options)
    _check(edits, options.compare_dense)
    return edits, bool(many)


def _folder(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PICTURES and not p.name.startswith("."))
    if not found:
        raise ConfigError(f"a folder of pictures must hold at least one, got {folder} without {', '.join(_PICTURES)}")
    for path in found:
        yield f"{path}: ", {_IMAGE: [str(path)], "out": f"{path.stem}.png"}


def _lines(index: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each line says, with paths that are right from here."""
    if not index.is_file():
        raise ConfigError(f"a JSON-lines file must be a file, got {index}, which does not exist")
    for number, line in enumerate(read_lines(index, (), "edit"), 1):
        where = f"{index}, edit {number}: "
        for name, value in line.items():
            if name != _IMAGE and name not in _TEXTS and name not in FIELDS:
                known = (_IMAGE, *_TEXTS, *FIELDS)
                raise ConfigError(f"{where}must have the fields {', '.join(known)}, got {name!r}{near(name, known)}")
            if name in _TEXTS and not isinstance(value, str):
                raise ConfigError(f"{where}{name} must be a text, got {json.dumps(value)}")
        images = line.get(_IMAGE)
        images = [images] if isinstance(images, str) else images
        if not (isinstance(images, list) and images and all(isinstance(path, str) for path in images)):
            raise ConfigError(f"{where}image must be a path or a list of paths, got {json.dumps(line.get(_IMAGE))}")
        name = line.get("out", f"{number:04d}-{Path(images[0]).stem}.png")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{where}out must be a name below the output folder, got {name}")
        yield where, line | {_IMAGE: [str(index.parent / path) for path in images], "out": name}


def _edits(line: dict[str, Any], where: str, out: Path, options: argparse.Namespace) -> list[Edit]:
    """One edit's pictures: `num_images` of them, from seeds that follow one another."""
    told = {name: getattr(options, name) for name in (*FIELDS, "prompt", "negative")}
    for name, read in FIELDS.items():
        if name in line:
            try:
                told[name] = read(json.dumps(line[name]))
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"{where}{name} {error}") from None
    told |= {name: line[name] for name in ("prompt", "negative") if name in line}
    if told["prompt"] is None:
        raise ConfigError(f"{where}a prompt must say what to make, got none: -p 'the cup on a beach'")
    images = tuple(Path(path) for path in line[_IMAGE])
    if "out" in line:
        place = out / line["out"]
    elif out.is_dir() or str(options.out).endswith(("/", os.sep)):
        place = out / f"{images[0].stem}.png"
    else:
        place = out
    count, seed = told.pop("num_images"), told["seed"]
    if seed + count > _SEEDS:
        raise ConfigError(f"{where}seeds must lie in [0, 2**64), got {count} from {seed} on")
    edit = Edit(images=images, out=place, **told)
    if count == 1:
        return [edit]
    digits = len(str(count))
    return [replace(edit, seed=seed + i, out=place.with_stem(f"{place.stem}-{i + 1:0{digits}d}")) for i in range(count)]


def _check(edits: list[Edit], dense: bool) -> None:
    references = {path for edit in edits for path in edit.images}
    for path in sorted(references):
        check_image(path)
    inputs, owners = {path.resolve() for path in references}, dict[Path, Edit]()
    for edit in edits:
        for out in (edit.out, edit.dense)[: 1 + dense]:
            if out.resolve() in inputs:
                raise ConfigError(f"the output must not be one of the references, got {out}")
            if (other := owners.setdefault(out.resolve(), edit)) is not edit:
                raise ConfigError(
                    f"each picture must have a file of its own, got {out} for {other.images[0]} and {edit.images[0]}"
                )
            check_place(out)
