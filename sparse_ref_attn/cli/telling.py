"""What ``sra run`` says: results on stdout, for a person or as JSON, and all else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from .terminal import show

__all__ = ["Telling"]


class Telling:
    """One command's voice.

    Parameters
    ----------
    as_json : bool
        A JSON object a result.
    quiet : bool
        No notes, no progress, no results but JSON.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json, self.quiet = as_json, quiet

    def note(self, text: str) -> None:
        """To whoever watches."""
        if text and not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def wrong(self, text: str) -> None:
        """What did not work while the command goes on."""
        print(f"sra: {text}", file=sys.stderr, flush=True)

    def result(self, record: dict[str, Any]) -> None:
        """A picture that was made, was there, or could not be made."""
        if self._as_json:
            print(json.dumps(record, allow_nan=False), flush=True)
        elif not self.quiet and record["status"] != "failed":
            show(_line(record))


def _line(record: dict[str, Any]) -> str:
    width, height = record["size"]
    if record["status"] == "there":
        return f"{record['picture']}: there already, {width} x {height}, seed {record['seed']}"
    kept = record["reference_tokens"]
    told = f"{record['picture']}: {width} x {height}, seed {record['seed']}, {record['steps']} steps, "
    told += f"{100 * kept['share']:.3g} % of {kept['all']:,} reference tokens, "
    told += "" if record["flop_ratio"] is None else f"{record['flop_ratio']:.2f}x less work, "
    told += f"{record['seconds']:.3g} s"
    dense = record["dense"]
    if dense is not None:
        told += f"; {dense['picture']} with all of them: {dense['seconds']:.3g} s ({dense['speedup']:.2f}x)"
    return told
