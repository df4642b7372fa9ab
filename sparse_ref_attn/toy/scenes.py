"""In-context pairs: references, a prompt, and the picture that answers it, all from one seed.

| task | references | answer |
|---|---|---|
| place | a subject on scenery | the subject elsewhere, on the pattern that the prompt names |
| pair | two of them | both subjects on the pattern |
| swap | a subject on scenery | the same picture, the scenery replaced by the pattern |
| local | a subject on scenery | the same picture, the subject recoloured |
| global | a subject on scenery | the same picture, all of it recoloured |
| open, open-pair | as place, pair | as place, pair, but on a texture that the prompt leaves open: one answer of many |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .backgrounds import Picture, random_pattern, scenery
from .sprites import Sprites
from .textures import random_texture
from .words import OPEN_TASKS, OPERATIONS, TASKS, offset_words

__all__ = ["TOKEN", "Scene", "scene"]

TOKEN = 8  # side of a token in pixels


@dataclass(frozen=True)
class Scene:
    """One pair.

    Parameters
    ----------
    task, prompt : str
        One of ``TASKS`` or ``OPEN_TASKS``, and what is asked for.
    subjects : tuple of int
        Rows of the sprites, one per reference.
    references, masks : tuple of ndarray
        (side, side, 3) pictures from 0 to 1, and (side, side) alphas of their subjects.
    target, mask : ndarray
        The answer, and the alpha of its subjects.
    places : tuple of (int, int, int)
        Column, row and side, in tokens, of each subject in the answer.
    """

    task: str
    prompt: str
    subjects: tuple[int, ...]
    references: tuple[Picture, ...]
    masks: tuple[Picture, ...]
    target: Picture
    mask: Picture
    places: tuple[tuple[int, int, int], ...]


def scene(
    sprites: Sprites,
    seed: tuple[int, ...],
    *,
    grid: int = 16,
    task: str | None = None,
    subjects: tuple[int, ...] | None = None,
    split: str = "train",
    background: Picture | None = None,
) -> Scene:
    """Draw one pair; the same arguments give the same pair.

    Parameters
    ----------
    sprites : Sprites
        From ``load_sprites``.
    seed : tuple of int
        Of this pair, such as (seed of the run, number of the pair).
    grid : {8, 16}
        Tokens along a side; a token is 8 x 8 pixels.
    task : str, optional
        One of ``TASKS`` or ``OPEN_TASKS``; one of ``TASKS`` is drawn by default.
    subjects : tuple of int, optional
        Rows of `sprites`; drawn by default.
    split : {"train", "held-out"}
        Photographs of the scenery. Subjects of "train" are also mirrored and their colours changed, for variety.
    background : ndarray, optional
        (side, side, 3), 0 to 1: what every reference shows behind its subject; scenery is drawn by default.

    Raises
    ------
    ConfigError
        For another grid or task, or a background of another size.
    """
    if grid not in (8, 16):
        raise ConfigError(f"grid must be 8 or 16 tokens, got {grid!r}")
    known = (*TASKS, *OPEN_TASKS)
    if task is not None and task not in known:
        raise ConfigError(f"task must be one of {', '.join(map(repr, known))}, got {task!r}")
    if background is not None and background.shape != (TOKEN * grid, TOKEN * grid, 3):
        raise ConfigError(f"background must be {(TOKEN * grid, TOKEN * grid, 3)}, got {background.shape}")
    rng = np.random.default_rng(seed)
    if task is None:
        task = TASKS[rng.choice(len(TASKS), p=(0.4, 0.2, 0.15, 0.15, 0.1))]
    asked = OPEN_TASKS.get(task, task)
    count = 2 if asked == "pair" else 1
    drawn = rng.choice(len(sprites), count, replace=False)
    rows = tuple(int(i) for i in drawn) if subjects is None else subjects
    size = 3 * grid // 8 if count == 2 else grid // 2
    figures = [_figure(sprites.pixels[size * TOKEN][row], rng, split == "train") for row in rows]
    side = grid * TOKEN
    sources = _corners(rng, grid, size, count)
    references = []
    for figure, at in zip(figures, sources, strict=True):
        references.append(_paste(scenery(rng, side, split) if background is None else background, figure, at))
    words = [asked]
    places = list(sources)
    if asked in ("place", "pair"):
        places = _places(rng, grid, size, count)
        for i, ((x0, y0), (x1, y1)) in enumerate(zip(sources, places, strict=True), 1):
            words += [f"{i}:x{x1}", f"{i}:y{y1}", *offset_words(i, x1 - x0, y1 - y0)]
    if asked in ("place", "pair", "swap"):
        target, named = (
            (random_texture(rng, side).picture(side), ["open"]) if task in OPEN_TASKS else random_pattern(rng, side)
        )
        words += named
        mask = np.zeros((side, side), np.float32)
        for figure, at in zip(figures, places, strict=True):
            target, alpha = _paste(target, figure, at)
            mask = np.maximum(mask, alpha)
    else:
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        words.append(operation)
        source, mask = references[0]
        recoloured = recolour(source, operation)
        target = recoloured if task == "global" else source + mask[..., None] * (recoloured - source)
    return Scene(
        task, " ".join(words), rows, tuple(r for r, _ in references), tuple(m for _, m in references), target, mask,
        tuple((x, y, size) for x, y in places),
    )  # fmt: skip


def recolour(picture: Picture, operation: str) -> Picture:
    """One of ``OPERATIONS`` on every pixel."""
    if operation == "inverted":
        return 1 - picture
    if operation == "grey":
        return np.repeat(picture.mean(-1, keepdims=True), 3, -1)
    if operation == "rotated":
        return picture[..., [1, 2, 0]]
    if operation == "swapped":
        return picture[..., ::-1]
    return picture * np.float32(0.5)


def _corners(rng: np.random.Generator, grid: int, size: int, count: int) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for x, y in rng.integers(0, grid - size + 1, (count, 2))]


def _places(rng: np.random.Generator, grid: int, size: int, count: int) -> list[tuple[int, int]]:
    """Corners of `count` squares that do not overlap."""
    while True:
        places = _corners(rng, grid, size, count)
        if count == 1 or max(abs(a - b) for a, b in zip(*places, strict=True)) >= size:
            return places


def _figure(pixels: NDArray[np.uint8], rng: np.random.Generator, vary: bool) -> Picture:
    figure = pixels.astype(np.float32) / 255
    if not vary:
        return figure
    rgb, alpha = figure[..., rng.permutation(3)], figure[..., 3:]
    if rng.random() < 0.25:
        rgb = alpha - rgb
    figure = np.concatenate([rgb, alpha], -1)
    return figure[:, ::-1] if rng.random() < 0.5 else figure


def _paste(picture: Picture, figure: Picture, at: tuple[int, int]) -> tuple[Picture, Picture]:
    """The picture with the figure at (column, row) in tokens, and the figure's alpha at the picture's size."""
    x, y = (TOKEN * v for v in at)
    side = figure.shape[0]
    alpha = np.zeros(picture.shape[:2], np.float32)
    alpha[y : y + side, x : x + side] = figure[..., 3]
    picture = picture.copy()
    window = picture[y : y + side, x : x + side]
    window *= 1 - figure[..., 3:]
    window += figure[..., :3]
    return picture, alpha
