"""Data sets on disk, in the layouts that they are published in; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..metadata import read_lines
from ..pictures import check_image, open_image
from ..vocabulary import chosen
from .examples import Example, Examples, Mask

__all__ = ["LAYOUTS", "load_examples"]


def load_examples(folder: str, layout: str = "folder") -> Examples:
    """The examples of a folder.

    Parameters
    ----------
    folder : str
    layout : str
        One of ``LAYOUTS``:

        - "folder": ``metadata.jsonl`` with a line ``{"reference": "a.png", "prompt": "..."}`` for each example;
          ``reference`` may be a list. It may also have ``target``, ``mask`` (of the target), ``reference_mask`` (one,
          or as many as references), ``id`` and ``family``. Files are named from the folder; masks are grey pictures.
        - "kontext-bench": black-forest-labs/kontext-bench as it is published, ``test/metadata.jsonl`` with
          ``file_name``, ``key``, ``instruction`` and ``category``, which is the family.
        - "dreambench++": the folder with ``images/**/NAME.jpg`` and ``captions/**/NAME.txt``, whose first line names
          the subject and whose further lines are prompts, each an example. The folder of a picture is its family.
        - "pie-bench": ``mapping_file.json`` and ``annotation_images/``. The prompt is the editing instruction, the
          family the first folder of the picture's path, and the mask is of the edited part. As in the authors' own
          evaluation the mask is for 512 x 512 pixels and its border counts as edited.

    Raises
    ------
    ConfigError
        If the folder is not laid out so, has no example, or a picture is missing or unreadable.
    """
    layout = chosen("the layout of a data set", layout, LAYOUTS)
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"a data set must be a folder, got {folder}")
    return LAYOUTS[layout](root)


def _folder(root: Path) -> Examples:
    lines = _lines(root / "metadata.jsonl", ("prompt",))
    rows: list[tuple[Any, ...]] = []
    for number, line in enumerate(lines, 1):
        references, masks = _listed(line.get("reference")), _listed(line.get("reference_mask"))
        if not references or not all(isinstance(name, str) for name in references):
            raise ConfigError(f"{root}/metadata.jsonl, example {number} must have a reference, got {line}")
        if masks and len(masks) != len(references):
            raise ConfigError(
                f"{root}/metadata.jsonl, example {number} must have a mask for each reference, got {len(masks)} for "
                f"{len(references)}"
            )
        files = [line.get(name) for name in ("target", "mask")]
        _check([root / name for name in (*references, *masks, *(f for f in files if f is not None))])
        rows.append((references, masks, *files))
    keys = [(str(line.get("id", number)), str(line.get("family", "all"))) for number, line in enumerate(lines)]

    def open(index: int) -> Example:
        references, masks, target, mask = rows[index]
        return Example(
            *keys[index], tuple(open_image(root / name) for name in references), lines[index]["prompt"],
            None if target is None else open_image(root / target),
            None if mask is None else _mask(root / mask),
            tuple(_mask(root / name) for name in masks) or None,
        )  # fmt: skip

    return Examples(
        _about("folder", root / "metadata.jsonl"), keys, open,
        targets=any(row[2] for row in rows), masks=any(row[3] for row in rows),
        reference_masks=any(row[1] for row in rows),
    )  # fmt: skip


def _kontext_bench(root: Path) -> Examples:
    root = root / "test" if (root / "test" / "metadata.jsonl").is_file() else root
    index = root / "metadata.jsonl"
    lines = _lines(index, ("file_name", "instruction"))
    _check([root / line["file_name"] for line in lines])
    keys = [(str(line.get("key", line["file_name"])), str(line.get("category", "all"))) for line in lines]

    def open(i: int) -> Example:
        return Example(*keys[i], (open_image(root / lines[i]["file_name"]),), lines[i]["instruction"])

    return Examples(_about("kontext-bench", index), keys, open)


def _dreambench(root: Path) -> Examples:
    root = root if (root / "captions").is_dir() else root / "data"
    captions = sorted((root / "captions").rglob("*.txt"))
    if not captions:
        raise ConfigError(f"DreamBench++ must have captions/**/*.txt beside images/, got none in {root}")
    keys, rows = [], []
    for path in captions:
        name = path.relative_to(root / "captions").with_suffix("")
        picture = next((p for s in (".jpg", ".png") if (p := (root / "images" / name).with_suffix(s)).is_file()), None)
        if picture is None:
            raise ConfigError(f"each caption must have its picture, got none at {root / 'images' / name}.jpg")
        _check([picture])
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
        if not prompts:
            raise ConfigError(f"{path} must have the subject and, below it, prompts, got none")
        for number, prompt in enumerate(prompts):
            keys.append((f"{name.as_posix()}/{number}", name.parent.name))
            rows.append((picture, prompt))

    def open(i: int) -> Example:
        return Example(*keys[i], (open_image(rows[i][0]),), rows[i][1])

    return Examples(_about("dreambench++", *captions), keys, open)


def _pie_bench(root: Path) -> Examples:
    index = root / "mapping_file.json"
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"PIE-Bench must have mapping_file.json, got none in {root}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{index} must be JSON, got: {error}") from error
    keys, rows = [], []
    for key, entry in entries.items():
        if not all(isinstance(entry.get(name), str) for name in ("image_path", "editing_instruction")):
            raise ConfigError(f"{index}, {key} must have image_path and editing_instruction, got {entry}")
        keys.append((key, Path(entry["image_path"]).parts[0]))
        rows.append((root / "annotation_images" / entry["image_path"], entry["editing_instruction"], entry.get("mask")))
    if not keys:
        raise ConfigError(f"{index} must name at least one picture, got none")
    _check([row[0] for row in rows])

    def open(i: int) -> Example:
        mask = _runs(rows[i][2]) if rows[i][2] else None
        own = None if mask is None else (mask,)
        return Example(*keys[i], (open_image(rows[i][0]),), rows[i][1], mask=mask, reference_masks=own)

    masked = any(row[2] for row in rows)
    return Examples(_about("pie-bench", index), keys, open, masks=masked, reference_masks=masked)


LAYOUTS: Mapping[str, Callable[[Path], Examples]] = {
    "folder": _folder,
    "kontext-bench": _kontext_bench,
    "dreambench++": _dreambench,
    "pie-bench": _pie_bench,
}
"""How a data set may lie on disk."""


def _lines(index: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a ``metadata.jsonl``, each with the texts `fields`."""
    if not index.is_file():
        raise ConfigError(f"a data set must have metadata.jsonl, got none in {index.parent}")
    return read_lines(index, fields, "example")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _check(paths: Sequence[Path]) -> None:
    """All are pictures: told before anything is generated."""
    for path in paths:
        check_image(path)


def _mask(path: Path) -> Mask:
    return np.asarray(open_image(path, "L"), dtype=np.float32) / 255


def _runs(runs: Sequence[int], side: int = 512) -> Mask:
    """The mask of PIE-Bench: pairs (first pixel, pixels) in rows from the top.

    >>> _runs([5, 2], side=4).astype(int).tolist()
    [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    """
    flat = np.zeros(side * side, np.float32)
    for first, length in zip(runs[::2], runs[1::2], strict=True):
        flat[first : first + length] = 1
    mask = flat.reshape(side, side)
    mask[[0, -1]] = 1
    mask[:, [0, -1]] = 1
    return mask


def _about(layout: str, *indices: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    for path in indices:
        digest.update(path.read_bytes())
    return {"layout": layout, "digest": digest.hexdigest()[:16]}
