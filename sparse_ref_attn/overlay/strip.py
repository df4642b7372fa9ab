"""The strip that shows the tokens kept in each step."""

from __future__ import annotations

import math
import os
from typing import IO, TYPE_CHECKING

from ..errors import LayoutError
from ..record import RunRecord
from .canvas import FAINT, INK, MARGIN, PAPER, WIDTH, across, down, page, save, typeface, words

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["budget_strip", "save_budget_strip"]

KIND_COLOURS = {
    "profile": (230, 138, 30),
    "in_flight": (190, 92, 160),
    "dense": (150, 156, 166),
    "sparse": (46, 108, 180),
    "cached": (58, 165, 150),
}
KIND_WORDS = {
    "profile": "profile (all tokens, attention measured)",
    "in_flight": "in flight (all tokens in the first blocks, attention measured)",
    "dense": "dense (all tokens)",
    "sparse": "sparse",
    "cached": "cached",
}


def save_budget_strip(record: RunRecord, path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Draw the reference tokens that took part in each step, N(t), as bars coloured by the step's kind.

    Parameters
    ----------
    record : RunRecord
        A run with at least one step.
    path : path-like or binary file
        1400 pixels wide, in the format that the name ends in, as `save_overlay`.

    Raises
    ------
    LayoutError
        If no step was run.
    ConfigError
        As `save_overlay`.

    Notes
    -----
    Needs Pillow.
    """
    inner = WIDTH - 2 * MARGIN
    save(page(down([words("Reference tokens per step", 22, inner), budget_strip(record, inner)], 8)), path)


def budget_strip(record: RunRecord, width: int, shown: int | None = None) -> Image.Image:
    """Bars of the reference tokens in each step, with axes and a legend."""
    from PIL import Image, ImageDraw

    if not record.steps:
        raise LayoutError("a budget strip needs a run with at least one step, got none: call the pipeline first")
    steps = max(record.total_steps, *(s.index + 1 for s in record.steps))
    most = max(record.layout.reference_tokens, 1)
    left, top, high = 96, 26, 200
    right = width - 16 - math.ceil(typeface(14).getlength(f"all {most:,}"))
    image = Image.new("RGB", (width, top + high + 78), PAPER)
    draw = ImageDraw.Draw(image)
    bottom = top + high

    def y(tokens: float) -> int:
        return bottom - round(high * tokens / most)

    for tick in _ticks(most, 4):
        draw.line([(left, y(tick)), (right, y(tick))], fill=(226, 229, 233))
        draw.text((left - 8, y(tick)), f"{tick:,}", INK, typeface(14), anchor="rm")
    each = (right - left) / steps
    gap = each * 0.15 if each >= 5 else 0
    longest = max(typeface(12).getlength(f"{s.kept:,}") for s in record.steps)
    for s in record.steps:
        x0 = round(left + s.index * each + gap)
        x1 = max(x0, round(left + (s.index + 1) * each - gap) - 1)
        draw.rectangle([x0, min(y(s.kept), bottom - 1), x1, bottom - 1], fill=KIND_COLOURS.get(s.kind, FAINT))
        if longest + 3 <= each:
            label_at = (x0 + x1) / 2, y(s.kept) - 4
            draw.rectangle(draw.textbbox(label_at, f"{s.kept:,}", typeface(12), anchor="mb"), fill=PAPER)
            draw.text(label_at, f"{s.kept:,}", INK, typeface(12), anchor="mb")
    for dash in range(left, right, 10):
        draw.line([(dash, y(most)), (min(dash + 5, right), y(most))], fill=FAINT)
    draw.text((right + 8, y(most)), f"all {most:,}", INK, typeface(14), anchor="lm")
    draw.line([(left, bottom), (right, bottom)], fill=INK)
    for tick in _ticks(steps - 1, (right - left) // 36):
        draw.text((left + (tick + 0.5) * each, bottom + 8), f"{tick}", INK, typeface(14), anchor="mt")
    if shown is not None:
        x = left + (shown + 0.5) * each
        draw.polygon([(x, bottom + 26), (x - 7, bottom + 38), (x + 7, bottom + 38)], fill=INK)
    label = Image.new("RGB", (high + 20, 22), PAPER)
    ImageDraw.Draw(label).text((high // 2 + 10, 2), "reference tokens", INK, typeface(15), anchor="mt")
    image.paste(label.rotate(90, expand=True), (0, top - 10))
    draw.text(((left + right) / 2, bottom + 44), "step (the first is 0)", INK, typeface(15), anchor="mt")
    parts: list[Image.Image] = []
    for kind in [k for k in KIND_COLOURS if any(s.kind == k for s in record.steps)]:
        parts += [Image.new("RGB", (16, 16), KIND_COLOURS[kind]), words(KIND_WORDS[kind] + "   ", 15)]
    if shown is not None:
        mark = Image.new("RGB", (16, 16), PAPER)
        ImageDraw.Draw(mark).polygon([(8, 2), (1, 14), (15, 14)], fill=INK)
        parts += [mark, words("step drawn above", 15)]
    legend = across(parts, 8)
    return down([image, across([Image.new("RGB", (left - 8, 1), PAPER), legend], 8)], 0)


def _ticks(most: int, about: int) -> list[int]:
    """Multiples of 1, 2 or 5 times a power of ten from 0 to `most`, some `about` of them."""
    step = 1
    while most / step > about:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return list(range(0, most + 1, step))
