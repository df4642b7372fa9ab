"""``metadata.jsonl``: a JSON object a line, for each example of a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError

__all__ = ["read_lines"]


def read_lines(index: Path, fields: Sequence[str], noun: str) -> list[dict[str, Any]]:
    """The objects of a file, blank lines left out.

    Parameters
    ----------
    index : Path
        The file, which exists.
    fields : sequence of str
        Texts that every object must have.
    noun : str
        What a line describes, for the messages.

    Raises
    ------
    ConfigError
        For a file that is not UTF-8 or has no objects, and, by its number, for a line that is no such object.
    """
    try:
        lines = index.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{index} must be readable text in UTF-8, got: {error}") from error
    found = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{index}, line {number} must be a JSON object, got: {error}") from error
        if not isinstance(line, dict) or not all(isinstance(line.get(field), str) for field in fields):
            raise ConfigError(f"{index}, line {number} must have the texts {', '.join(fields)}, got {text[:80]}")
        found.append(line)
    if not found:
        raise ConfigError(f"{index} must name at least one {noun}, got an empty file")
    return found
