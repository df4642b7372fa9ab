"""A picture's file that says how it was made: a JSON text in PNG or JPEG, whole or not there at all."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import fits, replacing
from ..pictures import notes_of

__all__ = ["FORMATS", "KEY", "check_place", "record_of", "save"]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
KEY = "sparse_ref_attn"
"""Of the text in a PNG, and of the JSON object in a JPEG's comment."""
_COMMENT = 65_533  # bytes that a JPEG's comment holds
_QUALITY = {"quality": 95, "subsampling": 0}


def save(picture: Any, path: Path, record: dict[str, Any]) -> None:
    """Write a picture and the record of how it was made; a file that was there stays until this one is whole.

    Parameters
    ----------
    picture : PIL.Image.Image
    path : Path
        Ends in one of `FORMATS`; its folder is made if need be.
    record : dict
        JSON types.

    Raises
    ------
    ConfigError
        If it cannot be written, or the record does not fit into a JPEG.
    """
    from PIL.PngImagePlugin import PngInfo

    file = io.BytesIO()
    if FORMATS[path.suffix.lower()] == "PNG":
        text = PngInfo()
        text.add_itxt(KEY, json.dumps(record, ensure_ascii=False))
        picture.save(file, "PNG", pnginfo=text)
    else:
        comment = json.dumps({KEY: record}).encode()
        if len(comment) > _COMMENT:
            raise ConfigError(f"a JPEG's record must fit into {_COMMENT} bytes, got {len(comment)}: use .png")
        picture.convert("RGB").save(file, "JPEG", comment=comment, **_QUALITY)
    with fits(path.name, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        Path(draft).write_bytes(file.getbuffer())


def record_of(path: Path) -> dict[str, Any] | None:
    """What `save` wrote beside the picture; None for any other file."""
    kind, notes = notes_of(path)
    found = notes.get(KEY if kind == "PNG" else "comment")
    try:
        record = json.loads(found) if found else None
    except ValueError:
        return None
    record = record.get(KEY) if isinstance(found, bytes) and isinstance(record, dict) else record
    return record if isinstance(record, dict) else None


def check_place(path: Path) -> None:
    """Raise ConfigError where no picture can be written, or would replace a file that `save` did not write.

    The folder is made later, with the first picture.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"the output must end in {', '.join(FORMATS)}, got {path}")
    if path.is_dir():
        raise ConfigError(f"the output must be a picture, got {path}, which is a folder")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"the output must lie in a folder that can be written to, got {path} below {folder}")
    if path.exists() and record_of(path) is None:
        raise ConfigError(f"the output must be new, or a picture that sra run made, got {path}, which is another file")
