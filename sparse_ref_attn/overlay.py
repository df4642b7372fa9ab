"""Pictures of a finished run: which reference tokens were kept, their scores, the budget over steps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

import numpy as np
import torch

from .errors import ConfigError, LayoutError
from .record import RunRecord, StepRecord

if TYPE_CHECKING:
    from PIL import Image, ImageFont

__all__ = ["save_budget_strip", "save_overlay"]

WIDTH, MARGIN, GAP = 1400, 40, 24  # pixels
PAPER, INK, FAINT = (255, 255, 255), (34, 38, 46), (118, 124, 134)
OUTLINE, NEUTRAL = (255, 255, 255), ((206, 208, 212), (180, 183, 189))
DIM, COLOUR_LEFT = 0.3, 0.25  # brightness and saturation that dropped tokens keep
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
# Viridis (Smith and van der Walt, 2015) at ten even points: perceptually uniform, rising in lightness.
HEAT = np.array(
    [
        (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
        (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
    ],
    dtype=np.float64,
)  # fmt: skip


def save_overlay(record: RunRecord, path: str | os.PathLike[str] | IO[bytes], step: int | None = None) -> None:
    """Draw the references with what one step dropped dimmed, the scores, and the budget over steps.

    Kept tokens have the reference's own colours and a light outline, dropped ones are dark and
    nearly grey. A reference without pixels is a grey checkerboard, one cell a token; tokens without
    a grid are a strip, left to right. Beside or below each stands the heat of its scores,
    on its own scale.

    Parameters
    ----------
    record : RunRecord
        A finished run.
    path : path-like or binary file
        Where the PNG is written, 1400 pixels wide.
    step : int, optional
        Counted from 0. Default: the last sparse (or cached) step; the last step of a run that kept
        every token.

    Raises
    ------
    LayoutError
        If no step was run, or selections, scores or pixels do not fit the references.
    ConfigError
        If `step` was not run.

    Notes
    -----
    Needs Pillow. Of a batch the first item's pixels are drawn. One sync a reference.

    Examples
    --------
    >>> import tempfile
    >>> from sparse_ref_attn.types import Reference, RefSelection, TokenLayout
    >>> run = RunRecord(TokenLayout(8, 0, (0, 4), (Reference(4, 4, (2, 2)),)), 1, 1)
    >>> run.steps.append(StepRecord(0, "sparse", 1, selection=RefSelection(torch.tensor([2]), (4,))))
    >>> with tempfile.TemporaryFile() as file:
    ...     save_overlay(run, file)
    ...     file.tell() > 0
    True
    """
    shown = _choose(record, step)
    kept = _kept_masks(record, shown)
    count = len(kept)
    columns = min(count, 1 if count == 1 else 2 if count <= 4 else 3 if count <= 9 else 4 if count <= 32 else 5)
    cell = (WIDTH - 2 * MARGIN - (columns - 1) * 2 * GAP) // columns
    tallest = 760 if count == 1 else round(0.62 * cell)
    tiles = [_reference(record, i, mask, cell, tallest) for i, mask in enumerate(kept)]
    rows = [_across(tiles[i : i + columns], 2 * GAP, width=cell) for i in range(0, count, columns)]
    total, everything = sum(int(mask.sum()) for mask in kept), record.layout.reference_tokens
    title = f"Reference tokens kept at step {shown.index} ({shown.kind})"
    line = f"{total:,} of {everything:,} reference tokens took part in this step ({_percent(total / everything)})"
    inner = WIDTH - 2 * MARGIN
    notes = [_words(note, 16, inner, FAINT) for note in record.notes]
    head = _down([_words(title, 30, inner), _words(line, 18, inner, FAINT), *notes], 4)
    budget = _down([_words("Budget over the run", 22, inner), _strip(record, inner, shown.index)], 8)
    _save(_down([head, _legend(record.scores is not None), *rows, budget], GAP), path)


def save_budget_strip(record: RunRecord, path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Draw the reference tokens that took part in each step, N(t), as bars coloured by the step's kind.

    Parameters
    ----------
    record : RunRecord
        A run with at least one step.
    path : path-like or binary file
        Where the PNG is written, 1400 pixels wide.

    Raises
    ------
    LayoutError
        If no step was run.

    Notes
    -----
    Needs Pillow.
    """
    inner = WIDTH - 2 * MARGIN
    _save(_down([_words("Reference tokens per step", 22, inner), _strip(record, inner)], 8), path)


def _kept_image(record: RunRecord, reference: int, kept: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """One reference with its dropped tokens dimmed and an outline around the kept ones.

    `kept` has the shape of the grid, `size` is (width, height) in pixels. Kept cells have the
    reference's colours exactly; the outline lies on dropped cells, where a cell has at least 4 pixels.
    """
    from PIL import Image

    base = np.asarray(_pixels(record, reference, kept.shape, size), dtype=np.float64)
    dim = _dimmed(base)
    share = _resize(kept.astype(np.float64), size)
    out = share[..., None] * base + (1 - share[..., None]) * dim
    edge = min(size[0] / kept.shape[1], size[1] / kept.shape[0])
    if edge >= 4:
        near, inside = share > 0.5, share > 0.5
        for _ in range(2 if edge >= 14 else 1):
            near = _grown(near)
        out[near & ~inside] = OUTLINE
    return Image.fromarray(np.round(out).clip(0, 255).astype(np.uint8))


def _heat_image(scores: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Scores as colours, dark violet (low) to yellow (high).

    The 1st to 99th percentile is spread over the colours, so that one outlier does not hide the
    rest. Scores that are not finite are grey; equal scores are all low.
    """
    from PIL import Image

    fine = np.isfinite(scores)
    low, high = np.percentile(scores[fine], (1, 99)) if fine.any() else (0.0, 0.0)
    if high <= low and fine.any():  # a few peaks on a flat ground
        low, high = scores[fine].min(), scores[fine].max()
    unit = np.where(fine, scores - low, 0.0) / (high - low if high > low else 1.0)
    colours = _colour(unit.clip(0, 1))
    colours[~fine] = NEUTRAL[0]
    out = np.stack([_resize(colours[..., c], size) for c in range(3)], axis=-1)
    return Image.fromarray(np.round(out).clip(0, 255).astype(np.uint8))


def _choose(record: RunRecord, step: int | None) -> StepRecord:
    if not record.steps or not record.layout.references:
        raise LayoutError(
            f"an overlay needs a run with references, got {len(record.layout.references)} references and "
            f"{len(record.steps)} steps"
        )
    if step is None:
        sparse = [s for s in record.steps if s.kind == "sparse"]
        cached = [s for s in record.steps if s.kind == "cached" and s.selection is not None]
        return (sparse or cached or record.steps)[-1]
    found = [s for s in record.steps if s.index == step]
    if not found:
        first, last = record.steps[0].index, record.steps[-1].index
        raise ConfigError(f"step must be one that was run ({first} to {last}), got {step}")
    return found[-1]


def _kept_masks(record: RunRecord, step: StepRecord) -> list[np.ndarray]:
    """Per reference which tokens are kept, bool, on its grid; (1, tokens) without a grid."""
    sizes = record.layout.sizes
    if step.selection is None:
        if step.kept != sum(sizes):
            raise LayoutError(
                f"step {step.index} must say which {step.kept} tokens it kept, got no selection: the run's rival "
                "changed tokens instead of choosing them, so draw save_budget_strip"
            )
        rows = [np.ones(size, dtype=bool) for size in sizes]
    else:
        if tuple(step.selection.sizes) != sizes:
            raise LayoutError(
                f"the selection of step {step.index} must be for references of {sizes} tokens, "
                f"got one for {tuple(step.selection.sizes)}"
            )
        rows = [np.zeros(size, dtype=bool) for size in sizes]
        for row, kept in zip(rows, step.selection.split(), strict=True):
            row[kept.cpu().numpy()] = True
    return [row.reshape(r.grid or (1, -1)) for row, r in zip(rows, record.layout.references, strict=True)]


def _reference(record: RunRecord, i: int, kept: np.ndarray, width: int, tallest: int) -> Image.Image:
    """Caption, reference and heat of one reference, `width` pixels wide."""
    reference = record.layout.references[i]
    between = GAP // 2
    size, side_by_side = _fit(kept.shape, (width, tallest)), True
    if record.scores is not None:  # the heat stands beside or, for wide references, below
        size = _fit(kept.shape, ((width - between) // 2, tallest))
        below = _fit(kept.shape, (width, (tallest - between) // 2))
        side_by_side = 1.25 * size[0] * size[1] >= below[0] * below[1]
        size = size if side_by_side else below
    pictures = [_kept_image(record, i, kept, size)]
    if record.scores is not None:
        if len(record.scores) != len(record.layout.references) or record.scores[i].shape[0] != reference.length:
            got = [s.shape[0] for s in record.scores]
            raise LayoutError(f"the scores must have {list(record.layout.sizes)} entries, got {got}")
        scores = record.scores[i].detach().double().cpu().numpy().reshape(kept.shape)
        pictures.append(_heat_image(scores, size))
    number = int(kept.sum())
    name, share = f"reference {i + 1}", f"({_percent(number / kept.size)})"
    if width > 300:
        captions = [f"{name}: {number:,} of {reference.length:,} tokens kept {share}"]
    else:
        captions = [name, f"{number:,} of {reference.length:,} kept {share}"]
    grid = f"{reference.grid[0]} x {reference.grid[1]} tokens" if reference.grid else "no grid: tokens in order"
    if _given(record, i) is None and reference.grid is not None:
        grid += ", no pixels"
    text = [_words(caption, 18 if width > 500 else 15, width) for caption in captions]
    both = _across(pictures, between) if side_by_side else _down(pictures, between)
    return _down([_down([*text, _words(grid, 14, width, FAINT)], 0), both], 8)


def _fit(grid: tuple[int, ...], box: tuple[int, int]) -> tuple[int, int]:
    """Largest picture of the grid's shape within a box; whole pixels a token where a token has several."""
    if grid[0] == 1:  # a strip is drawn high enough to be seen
        return box[0], min(64, box[1])
    scale = min(box[0] / grid[1], box[1] / grid[0])
    scale = math.floor(scale) if scale >= 8 else scale
    return max(8, round(scale * grid[1])), max(8, round(scale * grid[0]))


def _given(record: RunRecord, i: int) -> torch.Tensor | None:
    return record.pixels[i] if i < len(record.pixels) else None


def _pixels(record: RunRecord, i: int, grid: tuple[int, ...], size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    given = _given(record, i)
    if given is None or record.layout.references[i].grid is None:
        checker = np.indices(grid).sum(0) % 2
        grey = _resize(np.where(checker, NEUTRAL[1][1], NEUTRAL[0][1]).astype(np.float64), size)
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if given.ndim != 4 or given.shape[1] != 3:
        raise LayoutError(f"a reference's pixels must have shape (b, 3, H, W), got {tuple(given.shape)}")
    image = torch.nan_to_num(given[0].detach().float().cpu()).clamp(-1, 1)
    array = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array)).resize(size, Image.Resampling.LANCZOS)


def _resize(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest where a cell has several pixels, the mean of the cells where a pixel has several."""
    from PIL import Image

    image = Image.fromarray(values.astype(np.float32))
    for axis, to in ((0, (size[0], image.height)), (1, size)):
        smaller = to[axis] < image.size[axis]
        image = image.resize(to, Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)
    return np.asarray(image, dtype=np.float64)


def _dimmed(colours: np.ndarray) -> np.ndarray:
    grey = colours @ (0.299, 0.587, 0.114)
    return DIM * (COLOUR_LEFT * colours + (1 - COLOUR_LEFT) * grey[..., None])


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def _colour(unit: np.ndarray) -> np.ndarray:
    at = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(unit, at, HEAT[:, c]) for c in range(3)], axis=-1)


def _legend(scores: bool) -> Image.Image:
    """What bright, dim and the colours mean, on one line."""
    from PIL import Image

    photo = Image.new("RGB", (22, 22), (214, 160, 92))
    dim = _dimmed(np.asarray(photo, dtype=np.float64))
    apart = Image.new("RGB", (12, 22), PAPER)
    parts = [photo, _words("kept: full colour", 16), apart]
    parts += [Image.fromarray(np.round(dim).astype(np.uint8)), _words("dropped: dark and grey", 16)]
    if scores:
        bar = _heat_image(np.linspace(0, 1, 200)[None], (200, 22))
        parts += [apart, _words("token score: low", 16), bar, _words("high (each reference on its own scale)", 16)]
    return _across(parts, 10)


def _strip(record: RunRecord, width: int, shown: int | None = None) -> Image.Image:
    """Bars of the reference tokens in each step, with axes and a legend."""
    from PIL import Image, ImageDraw

    if not record.steps:
        raise LayoutError("a budget strip needs a run with at least one step, got none: call the pipeline first")
    steps = max(record.total_steps, *(s.index + 1 for s in record.steps))
    most = max(record.layout.reference_tokens, 1)
    left, top, high = 96, 26, 200
    right = width - 16 - math.ceil(_font(14).getlength(f"all {most:,}"))
    image = Image.new("RGB", (width, top + high + 78), PAPER)
    draw = ImageDraw.Draw(image)
    bottom = top + high

    def y(tokens: float) -> int:
        return bottom - round(high * tokens / most)

    for tick in _ticks(most, 4):
        draw.line([(left, y(tick)), (right, y(tick))], fill=(226, 229, 233))
        draw.text((left - 8, y(tick)), f"{tick:,}", INK, _font(14), anchor="rm")
    across = (right - left) / steps
    gap = across * 0.15 if across >= 5 else 0
    longest = max(_font(12).getlength(f"{s.kept:,}") for s in record.steps)
    for s in record.steps:
        x0 = round(left + s.index * across + gap)
        x1 = max(x0, round(left + (s.index + 1) * across - gap) - 1)
        draw.rectangle([x0, min(y(s.kept), bottom - 1), x1, bottom - 1], fill=KIND_COLOURS.get(s.kind, FAINT))
        if longest + 3 <= across:
            label_at = (x0 + x1) / 2, y(s.kept) - 4
            draw.rectangle(draw.textbbox(label_at, f"{s.kept:,}", _font(12), anchor="mb"), fill=PAPER)
            draw.text(label_at, f"{s.kept:,}", INK, _font(12), anchor="mb")
    for dash in range(left, right, 10):
        draw.line([(dash, y(most)), (min(dash + 5, right), y(most))], fill=FAINT)
    draw.text((right + 8, y(most)), f"all {most:,}", INK, _font(14), anchor="lm")
    draw.line([(left, bottom), (right, bottom)], fill=INK)
    for tick in _ticks(steps - 1, (right - left) // 36):
        draw.text((left + (tick + 0.5) * across, bottom + 8), f"{tick}", INK, _font(14), anchor="mt")
    if shown is not None:
        x = left + (shown + 0.5) * across
        draw.polygon([(x, bottom + 26), (x - 7, bottom + 38), (x + 7, bottom + 38)], fill=INK)
    label = Image.new("RGB", (high + 20, 22), PAPER)
    ImageDraw.Draw(label).text((high // 2 + 10, 2), "reference tokens", INK, _font(15), anchor="mt")
    image.paste(label.rotate(90, expand=True), (0, top - 10))
    draw.text(((left + right) / 2, bottom + 44), "step (the first is 0)", INK, _font(15), anchor="mt")
    parts: list[Image.Image] = []
    for kind in [k for k in KIND_COLOURS if any(s.kind == k for s in record.steps)]:
        parts += [Image.new("RGB", (16, 16), KIND_COLOURS[kind]), _words(KIND_WORDS[kind] + "   ", 15)]
    if shown is not None:
        mark = Image.new("RGB", (16, 16), PAPER)
        ImageDraw.Draw(mark).polygon([(8, 2), (1, 14), (15, 14)], fill=INK)
        parts += [mark, _words("step drawn above", 15)]
    legend = _across(parts, 8)
    return _down([image, _across([Image.new("RGB", (left - 8, 1), PAPER), legend], 8)], 0)


def _ticks(most: int, about: int) -> list[int]:
    """Multiples of 1, 2 or 5 times a power of ten from 0 to `most`, some `about` of them."""
    step = 1
    while most / step > about:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return list(range(0, most + 1, step))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _words(text: str, size: int, width: int = WIDTH, colour: tuple[int, int, int] = INK) -> Image.Image:
    """Text on paper, wrapped between words to `width` pixels."""
    from PIL import Image, ImageDraw

    font = _font(size)
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    high = round(1.3 * size)
    image = Image.new("RGB", (math.ceil(max(font.getlength(line) for line in lines)), high * len(lines)), PAPER)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((0, i * high + high / 2), line, colour, font, anchor="lm")
    return image


def _down(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Images one below another, flush left."""
    from PIL import Image

    height = sum(image.height for image in images) + gap * (len(images) - 1)
    out = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    y = 0
    for image in images:
        out.paste(image, (0, y))
        y += image.height + gap
    return out


def _across(images: Sequence[Image.Image], gap: int, width: int | None = None) -> Image.Image:
    """Images side by side, each `width` wide if given; small ones (a legend) stand centred in height."""
    from PIL import Image

    widths = [width or i.width for i in images]
    height = max(i.height for i in images)
    out = Image.new("RGB", (sum(widths) + gap * (len(images) - 1), height), PAPER)
    x = 0
    for image, wide in zip(images, widths, strict=True):
        out.paste(image, (x, 0 if width else (height - image.height) // 2))
        x += wide + gap
    return out


def _save(content: Image.Image, path: str | os.PathLike[str] | IO[bytes]) -> None:
    from PIL import Image

    page = Image.new("RGB", (WIDTH, content.height + 2 * MARGIN), PAPER)
    page.paste(content, (MARGIN, MARGIN))
    page.save(path, format="PNG")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
