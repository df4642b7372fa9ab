"""Selectors that do not look at the reference: random and evenly spread."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .base import References, Selector

__all__ = ["Grid", "Random", "spread_order"]


@dataclass(frozen=True)
class Random(Selector):
    """Uniformly random scores, drawn from the library's own CPU generator: a seed reproduces on any device.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=8, text=0, generation=(0, 4), references=(Reference(4, 4, (2, 2)),))
    >>> refs = References(layout, torch.zeros(1, 4, 8), generator=torch.Generator().manual_seed(0))
    >>> Random().score(refs)[0]
    tensor([0.4963, 0.7682, 0.0885, 0.1320])
    """

    def score(self, references: References) -> list[Tensor]:
        device = references.tokens.device
        return [torch.rand(size, generator=references.generator).to(device) for size in references.sizes]


@dataclass(frozen=True)
class Grid(Selector):
    """Tokens spread evenly over each reference, whatever the budget: any prefix of the order is even.

    See `spread_order` for the order and its guarantee. Scores run from 1 (first) down to 0 (last).

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=9, text=0, generation=(0, 0), references=(Reference(0, 9, (3, 3)),))
    >>> Grid().score(References(layout, torch.zeros(1, 9, 8)))[0].reshape(3, 3)
    tensor([[0.8750, 0.3750, 0.7500],
            [0.1250, 1.0000, 0.0000],
            [0.6250, 0.2500, 0.5000]])
    """

    def score(self, references: References) -> list[Tensor]:
        device = references.tokens.device
        return [spread_score(*references.grid(i)).to(device) for i in range(len(references.sizes))]


def spread_score(height: int, width: int) -> Tensor:
    """`spread_order` as scores in [0, 1], shape (height * width,), float32, on the CPU."""
    order = spread_order(height, width)
    score = torch.empty(len(order))
    score[torch.tensor(order)] = torch.linspace(1, 0, len(order))
    return score


@lru_cache(maxsize=32)
def spread_order(height: int, width: int) -> tuple[int, ...]:
    """Order of a grid's cells in which every prefix covers the grid evenly.

    Farthest-point order [1]_ from the middle: each next cell is one of those farthest from all
    cells so far. No other choice of k cells can leave a gap less than half as wide as the first k
    of this order do. Among equally far cells the one first in two-dimensional van der Corput order [2]_
    is taken, so that a half-filled round is spread over the whole grid too.

    Parameters
    ----------
    height, width : int
        Size of the grid, each at least 1.

    Returns
    -------
    tuple of int
        A permutation of ``range(height * width)``; cells run left to right, top to bottom.

    Notes
    -----
    O((height * width)^2) array work on the CPU, 0.1 s for 64 x 64; kept for the next call.

    References
    ----------
    .. [1] T. F. Gonzalez, Clustering to minimize the maximum intercluster distance, Theoretical
       Computer Science 38, 1985.
    .. [2] J. G. van der Corput, Verteilungsfunktionen, 1935.

    Examples
    --------
    >>> spread_order(1, 5)
    (2, 0, 4, 1, 3)
    """
    y, x = np.divmod(np.arange(height * width), width)
    bits = max(height, width).bit_length()
    key = np.zeros_like(y)
    for bit in range(bits):  # the lowest bits of the position become the highest of the key
        key |= ((x >> bit) & 1) << (2 * (bits - 1 - bit))
        key |= ((y >> bit) & 1) << (2 * (bits - 1 - bit) + 1)
    cells = np.argsort(key)  # argmax takes the first maximum, so earlier in `cells` wins a tie
    y, x = y[cells], x[cells]
    distance = np.full(len(cells), np.iinfo(np.int64).max)
    order = []
    at = int(np.flatnonzero((y == height // 2) & (x == width // 2))[0])
    for _ in range(len(cells)):
        order.append(int(cells[at]))
        np.minimum(distance, (y - y[at]) ** 2 + (x - x[at]) ** 2, out=distance)
        at = int(distance.argmax())
    return tuple(order)
