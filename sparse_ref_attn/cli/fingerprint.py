"""What decides a picture, in one text: two edits with the same make the same picture."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..eval.loras import Lora
from . import execution
from .edits import Edit

__all__ = ["fingerprints"]

_ARGUMENTS = ("model", "quantize", "dtype", "set", "preset", "keep", "task", "select", "speedup", *execution.FIELDS)
"""Of the command, beside those of an `Edit`. A device makes the same picture but for rounding."""


def fingerprints(edits: Sequence[Edit], options: argparse.Namespace) -> list[str]:
    """One of each edit: settings, and the content of references, LoRAs and a selector; a model counts by its path.

    Parameters
    ----------
    edits : sequence of Edit
    options : argparse.Namespace
        Of ``sra run``.

    Returns
    -------
    list of str
        SHA-256 in hexadecimal.
    """
    common: dict[str, Any] = {name: getattr(options, name) for name in _ARGUMENTS}
    if options.model is not None and Path(options.model).is_dir():
        common["model"] = str(Path(options.model).resolve())
    if options.select is not None and Path(options.select).is_file():
        common["select"] = _digest(Path(options.select))
    common["loras"] = [_lora(Lora(path, scale)) for path, scale in options.lora or ()]
    contents = {path: _digest(path) for path in {path for edit in edits for path in edit.images}}
    found = []
    for edit in edits:
        own = {name: value for name, value in vars(edit).items() if name not in ("out", "images")}
        own["images"] = [contents[path] for path in edit.images]
        text = json.dumps(common | own, sort_keys=True, default=repr)
        found.append(hashlib.sha256(text.encode()).hexdigest())
    return found


def _lora(lora: Lora) -> tuple[str, float]:
    return lora.path if lora.file is None else _digest(lora.file), lora.scale


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
