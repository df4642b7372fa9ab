"""A document as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files import replacing

__all__ = ["write"]


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a document as JSON; a file that was there stays until this one is whole.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    with replacing(path) as draft:
        Path(draft).write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
