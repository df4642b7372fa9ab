"""Text for whoever reads it: as it is for a file or a pipe, aligned and as wide as the terminal for a person."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

__all__ = ["fitted", "saved", "show"]


def show(text: str) -> None:
    """Print, `fitted` where stdout is a terminal."""
    print(fitted(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text, flush=True)


def saved(folder: object, files: Sequence[tuple[str, str]]) -> None:
    """Where a command left what: the last that it says."""
    width = max((len(name) for name, _ in files), default=0)
    show("\n".join([f"\nWritten to {folder}", *(f"  {name:<{width}}  {what}" for name, what in files)]))


def fitted(text: str, width: int) -> str:
    """Text in lines of at most `width` columns.

    Markdown tables become aligned columns. Rows of a table are cut and end in "…", other lines go on below their value.

    Examples
    --------
    >>> print(fitted("| a | long name |\\n|---|--:|\\n| bb | 1 |", 9))
    a   long…
    --  ----…
    bb      …
    >>> print(fitted("steps   one two three", 16))
    steps   one two
            three
    """
    lines: list[str] = []
    table: list[list[str]] = []
    for line in [*text.split("\n"), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if table:
            lines += [_cut(row, width) for row in _columns(table)]
            table = []
        lines += _wrapped(line, width)
    return "\n".join(lines[:-1])


def _columns(table: list[list[str]]) -> list[str]:
    """A markdown table's cells, its second row saying which columns are flush right."""
    header, rule, *rows = table
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    pad = [str.rjust if mark.endswith(":") else str.ljust for mark in rule]
    cells = [header, ["-" * width for width in widths], *rows]
    return ["  ".join(p(cell, w) for p, cell, w in zip(pad, row, widths, strict=True)).rstrip() for row in cells]


def _wrapped(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    gaps = [gap.end() - 1 for gap in re.finditer(r"\S {2,}\S", line)]
    if len(gaps) > 1:
        return [_cut(line, width)]
    indent = gaps[0] if gaps and gaps[0] < width // 2 else len(line) - len(line.lstrip())
    return textwrap.wrap(line, width, subsequent_indent=" " * indent, drop_whitespace=True, break_on_hyphens=False)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"
