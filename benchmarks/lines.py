"""Results as JSON lines: printed and on disk as soon as each is known, so that an interruption loses none of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Lines", "read"]


class Lines:
    """A file of JSON objects, one a line; several processes may add to it.

    Parameters
    ----------
    path : Path
        Appended to.
    **common
        Stands in every line.
    """

    def __init__(self, path: Path, **common: Any) -> None:
        self.path, self._common = path, common
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **values: Any) -> dict[str, Any]:
        """One line, on disk before this returns."""
        line = self._common | values
        text = json.dumps(line, default=str)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        return line


def read(path: Path) -> list[dict[str, Any]]:
    """Every line, oldest first; one that a killed process left incomplete is passed over."""
    out = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            out.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return out
