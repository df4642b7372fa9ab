"""Reports as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["page", "plain", "table"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """An HTML table; right-aligned but for the columns in `left`.

    Examples
    --------
    >>> table(["a"], [["<1"]])
    '<table><tr><th style="text-align: left">a</th></tr><tr><td style="text-align: left">&lt;1</td></tr></table>'
    """

    def line(cells: Sequence[str], tag: str) -> str:
        sides = ["left" if i in left else "right" for i in range(len(cells))]
        return "".join(
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )

    lines = [line(header, "th")] * bool(header) + [line(row, "td") for row in rows]
    return f"<table>{''.join(f'<tr>{cells}</tr>' for cells in lines)}</table>"


def page(title: str, *parts: str, notes: Sequence[str] = ()) -> str:
    """A title above parts that are HTML already, and notes as a list."""
    listed = "".join(f"<li>{html.escape(' '.join(note.split()))}</li>" for note in notes)
    return f"<div><b>{html.escape(title)}</b>{''.join(parts)}{f'<ul>{listed}</ul>' if listed else ''}</div>"


def plain(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{html.escape(text)}</pre>"
