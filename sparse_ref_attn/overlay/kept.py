"""Each reference with the tokens that a step kept, beside their scores, above the budget strip."""

from __future__ import annotations

import math
import os
from typing import IO, TYPE_CHECKING

import numpy as np
import torch

from ..errors import ConfigError, LayoutError
from ..record import RunRecord, StepRecord
from .canvas import FAINT, GAP, MARGIN, PAPER, WIDTH, across, down, page, percent, save, words
from .strip import budget_strip

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["overlay", "save_overlay"]

OUTLINE, NEUTRAL = (255, 205, 0), ((206, 208, 212), (180, 183, 189))
VEIL, SEEN, COLOUR_LEFT = (20, 36, 84), 0.24, 0.25  # over dropped tokens, what shines through, and its saturation
# Viridis (Smith and van der Walt, 2015) at ten even points: perceptually uniform, rising in lightness.
HEAT = np.array(
    [
        (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
        (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
    ],
    dtype=np.float64,
)  # fmt: skip


def save_overlay(record: RunRecord, path: str | os.PathLike[str] | IO[bytes], step: int | None = None) -> None:
    """Write `overlay` to a file.

    Parameters
    ----------
    record, step
        As in `overlay`.
    path : path-like or binary file
        In the format that the name ends in (.png, .jpg, .jpeg, .webp, .tif, .tiff); a PNG otherwise.

    Raises
    ------
    LayoutError
        As `overlay`.
    ConfigError
        As `overlay`, for another ending, or if the file cannot be written.

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
    save(overlay(record, step), path)


def overlay(record: RunRecord, step: int | None = None) -> Image.Image:
    """Draw the references with what one step dropped darkened, the scores, and the budget over steps.

    Kept tokens have the reference's own colours and a yellow outline, dropped ones lie under a dark
    blue veil: both show on a white, a dark and a colourful photo. A reference without pixels is a grey
    checkerboard, one cell a token; tokens without a grid are a strip, left to right. Beside or below
    each stands the heat of its scores, on its own scale.

    Parameters
    ----------
    record : RunRecord
        A finished run.
    step : int, optional
        Counted from 0. Default: the last sparse (or cached) step; the last step of a run that kept
        every token.

    Returns
    -------
    PIL.Image.Image
        RGB, 1400 pixels wide.

    Raises
    ------
    LayoutError
        If no step was run, or selections, scores or pixels do not fit the references.
    ConfigError
        If `step` was not run.

    Notes
    -----
    Needs Pillow. Of a batch the first item's pixels are drawn. One sync a reference.
    """
    shown = _choose(record, step)
    kept = _kept_masks(record, shown)
    count = len(kept)
    columns = min(count, 1 if count == 1 else 2 if count <= 4 else 3 if count <= 9 else 4 if count <= 32 else 5)
    cell = (WIDTH - 2 * MARGIN - (columns - 1) * 2 * GAP) // columns
    tallest = 760 if count == 1 else round(0.62 * cell)
    tiles = [_reference(record, i, mask, cell, tallest) for i, mask in enumerate(kept)]
    rows = [across(tiles[i : i + columns], 2 * GAP, width=cell) for i in range(0, count, columns)]
    total, everything = sum(int(mask.sum()) for mask in kept), record.layout.reference_tokens
    title = f"Reference tokens kept at step {shown.index} ({shown.kind})"
    line = f"{total:,} of {everything:,} reference tokens took part in this step ({percent(total / everything)})"
    if shown.read is not None:
        line = f"the first {total:,} of {everything:,} in the run's ranking; each tile read as many of its own choice"
    inner = WIDTH - 2 * MARGIN
    notes = [words(note, 16, inner, FAINT) for note in record.notes]
    head = down([words(title, 30, inner), words(line, 18, inner, FAINT), *notes], 4)
    budget = down([words("Budget over the run", 22, inner), budget_strip(record, inner, shown.index)], 8)
    return page(down([head, _legend(record.scores is not None), *rows, budget], GAP))


def _kept_image(record: RunRecord, reference: int, kept: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """One reference with a veil over its dropped tokens and an outline around the kept ones.

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
        for _ in range(2 if edge >= 9 else 1):
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
    name, share = f"reference {i + 1}", f"({percent(number / kept.size)})"
    if width > 300:
        captions = [f"{name}: {number:,} of {reference.length:,} tokens kept {share}"]
    else:
        captions = [name, f"{number:,} of {reference.length:,} kept {share}"]
    grid = f"{reference.grid[0]} x {reference.grid[1]} tokens" if reference.grid else "no grid: tokens in order"
    if _given(record, i) is None and reference.grid is not None:
        grid += ", no pixels"
    text = [words(caption, 18 if width > 500 else 15, width) for caption in captions]
    both = across(pictures, between) if side_by_side else down(pictures, between)
    return down([down([*text, words(grid, 14, width, FAINT)], 0), both], 8)


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
    under = COLOUR_LEFT * colours + (1 - COLOUR_LEFT) * grey[..., None]
    return SEEN * under + (1 - SEEN) * np.asarray(VEIL, dtype=np.float64)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def _colour(unit: np.ndarray) -> np.ndarray:
    at = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(unit, at, HEAT[:, c]) for c in range(3)], axis=-1)


def _legend(scores: bool) -> Image.Image:
    """What outline, veil and the colours mean, on one line."""
    from PIL import Image, ImageOps

    photo, apart = Image.new("RGB", (18, 18), (214, 160, 92)), Image.new("RGB", (12, 22), PAPER)
    dim = _dimmed(np.asarray(photo.resize((22, 22)), dtype=np.float64))
    parts = [ImageOps.expand(photo, 2, OUTLINE), words("kept: own colours, outlined", 16), apart]
    parts += [Image.fromarray(np.round(dim).astype(np.uint8)), words("dropped: dark blue", 16)]
    if scores:
        bar = _heat_image(np.linspace(0, 1, 200)[None], (200, 22))
        parts += [apart, words("token score: low", 16), bar, words("high (each reference on its own scale)", 16)]
    return across(parts, 10)
