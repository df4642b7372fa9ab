"""What a call of Z-Image is given, lists of captions, pictures and their features, and where their rows lie."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Parts", "filled"]

Grid = tuple[int, int, int]

_MULTIPLE = 32  # of which the model makes every caption, picture and its features


def filled(rows: int) -> int:
    """Rows of a caption, a picture or its features with their padding.

    Examples
    --------
    >>> filled(32), filled(33)
    (32, 64)
    """
    return -(-rows // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class Parts:
    """The lists of a call, and the rows that the model makes of them.

    Each item's joint rows are its captions, its pictures, the generation last, and their features; the shorter item
    is padded behind. The padding of a part is seen by all others.

    Parameters
    ----------
    x : list
        Pictures (C, F, H, W) of each item.
    captions : list
        Rows (rows, D) of each caption of each item.
    patch : (int, int, int)
        Frames, height and width of a token.
    grids : tuple of (int, int, int)
        Tokens of each picture, alike in all items.
    words : tuple of int
        Rows of each item's captions.
    features : tuple of int
        Rows of each item's features.

    Examples
    --------
    >>> x = [[torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 4)]] * 2
    >>> parts = Parts.of(x, [[torch.zeros(3, 8)], [torch.zeros(40, 8)]], [None, None], (1, 2, 2))
    >>> parts.grids, parts.words, parts.rows, parts.joint
    (((1, 2, 2), (1, 1, 2)), (32, 64), 64, 128)
    >>> order = parts.order("single", "cpu")
    >>> order.shape, order[:, -6:].tolist()
    (torch.Size([2, 128]), [[32, 33, 34, 35, 64, 65], [64, 65, 66, 67, 96, 97]])
    """

    x: list[Any]
    captions: list[Any]
    patch: Grid
    grids: tuple[Grid, ...]
    words: tuple[int, ...]
    features: tuple[int, ...]

    @classmethod
    def of(cls, x: Any, captions: Any, features: Any, patch: Grid) -> Parts | None:
        """Of a call's lists; None where its items have not the same pictures."""
        items = [each if isinstance(each, list) else [each] for each in x]
        if any(picture is None for item in items for picture in item):
            return None
        shapes = [[picture.shape for picture in item] for item in items]
        if any(each != shapes[0] for each in shapes):
            return None
        grids = tuple(tuple(size // side for size, side in zip(shape[1:], patch, strict=True)) for shape in shapes[0])
        words = tuple(sum(filled(len(part)) for part in (c if isinstance(c, list) else [c])) for c in captions)
        own = [
            sum(_MULTIPLE if part is None else filled(prod(part.shape[:2])) for part in item or ())
            for item in features or [None] * len(items)
        ]
        return cls(x, captions, patch, grids, words, tuple(own))

    @property
    def sizes(self) -> list[int]:
        """Tokens of each picture."""
        return [prod(grid) for grid in self.grids]

    @property
    def rows(self) -> int:
        """Rows of an item's pictures."""
        return sum(map(filled, self.sizes))

    @property
    def joint(self) -> int:
        """Joint rows of the longest item."""
        return max(a + self.rows + b for a, b in zip(self.words, self.features, strict=True))

    @property
    def last(self) -> int:
        """Rows of the generation."""
        return filled(self.sizes[-1])

    def stream(self, device: torch.device | str) -> Tensor:
        """Which of the pictures' rows are tokens, (tokens,) int64."""
        starts = [0, *accumulate(map(filled, self.sizes))]
        return torch.cat(
            [torch.arange(at, at + size, device=device) for at, size in zip(starts, self.sizes, strict=False)]
        )

    def stays(self, rows: Tensor) -> Tensor:
        """The pictures' rows, ascending, that are padding or among the tokens `rows`."""
        padding = _tokens_last(self.stream(rows.device), self.rows)[: self.rows - sum(self.sizes)]
        return torch.cat([padding, self.stream(rows.device)[rows]]).sort().values

    def order(self, kind: str, device: torch.device | str) -> Tensor:
        """See `Adapter.order`; blocks of kind "image" see the pictures alone."""
        tokens = self.stream(device)
        firsts, rows = (self.words, self.joint) if kind == "single" else ((0,), self.rows)
        firsts = firsts[:1] if len(set(firsts)) == 1 else firsts
        return torch.stack([_tokens_last(first + tokens, rows) for first in firsts])

    def tokens(self) -> Tensor:
        """Tokens of every picture, (B, tokens, D), as the VAE has them: channels outermost."""
        items = [item if isinstance(item, list) else [item] for item in self.x]
        return torch.stack([torch.cat([_patches(picture, self.patch) for picture in item]) for item in items])

    def as_given(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) as the model cuts them: channels innermost."""
        return tokens.unflatten(-1, (-1, prod(self.patch))).transpose(-1, -2).flatten(-2)


def _tokens_last(tokens: Tensor, rows: int) -> Tensor:
    """All `rows`, with `tokens` (ascending) behind the others."""
    late = torch.zeros(rows, dtype=torch.int64, device=tokens.device).index_fill(0, tokens, rows)
    return (late + torch.arange(rows, device=tokens.device)).argsort()


def _patches(picture: Tensor, patch: Grid) -> Tensor:
    """(C, F, H, W) as (tokens, C * patch)."""
    c, *sizes = picture.shape
    (f, h, w), (pf, ph, pw) = (size // side for size, side in zip(sizes, patch, strict=True)), patch
    cells = picture.reshape(c, f, pf, h, ph, w, pw).permute(1, 3, 5, 0, 2, 4, 6)
    return cells.reshape(f * h * w, c * pf * ph * pw)
