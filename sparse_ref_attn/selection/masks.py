"""Selectors that follow the user: a subject mask, or boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .base import References, Selector
from .cells import area_pool, overlap
from .uniform import spread_score

__all__ = ["Boxes", "SubjectMask"]

STRETCH = 0.05  # pipelines stretch a reference to the nearest of a list of sizes
STEP = 1e-3  # share of a cell within which the tie-breaks live


@dataclass(frozen=True, eq=False)
class SubjectMask(Selector):
    """Keep the tokens that the user's mask marks.

    score = share s of the token's cell that is marked + 0.001 * t. Where s > 0, t in [1, 2] follows
    `spread_order`, so that a budget smaller than the subject covers all of it; elsewhere t in [0, 1] falls
    with the distance to the subject, so that a larger budget grows outward from it.

    Parameters
    ----------
    mask : tensor, array or PIL image, or a sequence of them
        One mask a reference, shape (H, W) at any resolution of the reference's aspect: bool; floats in
        [0, 1]; or integers, 0 to 255 or 0 and 1. None in a sequence marks the whole reference. A single
        mask is for a run with one reference. A pipeline may stretch a very wide reference: resize its mask too.

    Raises
    ------
    ConfigError
        If a mask has another shape, holds values outside its range or marks nothing; at scoring, if there
        are not as many masks as references, or a mask's aspect is another than its reference's (more
        than 5 % and one token away).

    Notes
    -----
    Equal only to itself, and it does not travel to JSON: masks are stored as given.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=4, text=0, generation=(0, 0), references=(Reference(0, 4, (2, 2)),))
    >>> mask = torch.zeros(32, 32)
    >>> mask[16:, :16] = 1
    >>> SubjectMask(mask).score(References(layout, torch.zeros(1, 4, 8)))[0].argmax().item()
    2
    """

    mask: Any

    def __post_init__(self) -> None:
        for mask in self._masks():
            if mask is not None:
                _marked(mask)

    def _masks(self) -> list[Any]:
        return list(self.mask) if isinstance(self.mask, (list, tuple)) else [self.mask]

    def score(self, references: References) -> list[Tensor]:
        masks = self._masks()
        _check_count("masks", len(masks), references)
        scores = []
        for i, mask in enumerate(masks):
            grid = references.grid(i)
            if mask is None:
                share = torch.ones(grid)
            else:
                marked = _marked(mask)
                _check_aspect(i, marked.shape[0], marked.shape[1], grid)
                share = area_pool(marked.double(), grid).reshape(grid)
            scores.append(_grown(share).to(references.tokens.device))
        return scores


@dataclass(frozen=True)
class Boxes(Selector):
    """Keep the tokens inside the user's boxes.

    score = share of the token's cell that the boxes cover together, with the tie-breaks of `SubjectMask`.

    Parameters
    ----------
    boxes : sequence of (sequence of (x0, y0, x1, y1) or None)
        For each reference its boxes, as fractions of its width and height: 0 <= x0 < x1 <= 1 and
        0 <= y0 < y1 <= 1, (0, 0) being the top left corner. None stands for the whole reference.

    Raises
    ------
    ConfigError
        If a box is malformed or a reference has an empty list; at scoring, if there are not as many
        lists as references.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=4, text=0, generation=(0, 0), references=(Reference(0, 4, (2, 2)),))
    >>> select = Boxes([[(0.5, 0.0, 1.0, 0.5)]])
    >>> select.score(References(layout, torch.zeros(1, 4, 8)))[0].argmax().item()
    1
    """

    boxes: Sequence[Sequence[tuple[float, float, float, float]] | None]

    def __post_init__(self) -> None:
        try:
            boxes = tuple(
                None if some is None else tuple(tuple(float(edge) for edge in box) for box in some)
                for some in self.boxes
            )
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last from a tensor
            raise ConfigError(
                f"boxes must be, for each reference, a list of (x0, y0, x1, y1), got {self.boxes!r}"
            ) from error
        for some in boxes:
            if some is not None and not some:
                raise ConfigError("a reference must have at least one box, or None for all of it, got an empty list")
            for box in some or ():
                if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                    raise ConfigError(
                        f"a box must be (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got {box}"
                    )
        object.__setattr__(self, "boxes", boxes)

    def score(self, references: References) -> list[Tensor]:
        _check_count("lists of boxes", len(self.boxes), references)
        scores = []
        for i, boxes in enumerate(self.boxes):
            grid = references.grid(i)
            share = torch.ones(grid) if boxes is None else _covered(boxes, grid)
            scores.append(_grown(share).to(references.tokens.device))
        return scores


def _check_count(what: str, count: int, references: References) -> None:
    if count != len(references.sizes):
        raise ConfigError(f"there must be as many {what} as references, {len(references.sizes)}, got {count}")


def _marked(mask: Any) -> Tensor:
    """A mask as given to (H, W) float32 in [0, 1] on the CPU."""
    if isinstance(mask, Tensor):
        values = mask.detach().cpu()
    else:
        if hasattr(mask, "getbands"):  # a PIL image: alpha and palettes are not grey levels
            mask = mask.convert("L")
        array = np.asarray(mask)
        if array.dtype.kind not in "biuf":
            raise ConfigError(f"a mask must be an image of numbers, got {type(mask).__name__}")
        values = torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))
        if array.dtype.kind == "b":
            values = values.bool()
    if values.ndim != 2 or not values.numel():
        raise ConfigError(f"a mask must have shape (H, W), got {tuple(values.shape)}")
    if not values.is_floating_point() and values.dtype != torch.bool and int(values.max()) > 1:
        values = values / 255
    values = values.float()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ConfigError(
            "a mask must be bool, floats in [0, 1], or integers in 0..255, "
            f"got {getattr(mask, 'dtype', 'values')} from {float(values.min())} to {float(values.max())}"
        )
    if not bool(values.any()):
        raise ConfigError("a mask must mark at least one pixel, got all zeros")
    return values


def _check_aspect(i: int, height: int, width: int, grid: tuple[int, int]) -> None:
    stretch = math.log(width / height) - math.log(grid[1] / grid[0])
    if abs(stretch) > math.log1p(STRETCH + 1 / min(grid)):
        raise ConfigError(
            f"mask {i} must have the aspect of its reference, {grid[1] / grid[0]:.3f} wide to high "
            f"({grid[1]} x {grid[0]} tokens), got {width / height:.3f} ({width} x {height} pixels)"
        )


def _covered(boxes: Sequence[tuple[float, ...]], grid: tuple[int, int]) -> Tensor:
    """Share of each cell that the union of the boxes covers, (h, w) float64."""
    edges = torch.tensor(boxes, dtype=torch.float64)
    x0, y0, x1, y1 = edges.T
    ys, xs = (torch.cat([torch.tensor([0.0, 1.0]).double(), *ends]).unique() for ends in ((y0, y1), (x0, x1)))
    y, x = (ys[:-1] + ys[1:]) / 2, (xs[:-1] + xs[1:]) / 2
    tall = (y0[:, None] < y) & (y < y1[:, None])
    wide = (x0[:, None] < x) & (x < x1[:, None])
    inside = (tall[:, :, None] & wide[:, None, :]).any(0).double()
    rows, columns = (
        overlap(at, torch.arange(n + 1, dtype=torch.float64) / n) for at, n in zip((ys, xs), grid, strict=True)
    )
    return rows @ inside @ columns.T


def _grown(share: Tensor) -> Tensor:
    """Covered shares (h, w) to scores (h * w,), float32: see `SubjectMask`."""
    height, width = share.shape
    subject = share > 0
    y, x = torch.arange(height), torch.arange(width)
    far = 4 * (height + width) ** 2
    # Exact squared distance to the subject, one axis after the other.
    across = torch.where(subject[:, None, :], (x[:, None] - x) ** 2, far).amin(-1)
    square = (((y[:, None] - y) ** 2)[:, :, None] + across[None]).amin(1)
    distance = square.double().sqrt()
    outside = 1 - distance / (distance.max() + 1)
    inside = 1 + spread_score(height, width).reshape(height, width).double()
    return (share + STEP * torch.where(subject, inside, outside)).flatten().float()
