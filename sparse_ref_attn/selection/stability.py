"""How much of a ranking is left when it is made again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LayoutError
from .combine import mean_ranks

__all__ = ["overlap", "spearman"]


def spearman(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """Spearman's rank correlation of two rankings of the same references, one a reference, in [-1, 1].

    Parameters
    ----------
    before, after : sequence of Tensor, shapes (R_i,)
        Scores; equal ones share their mean rank. NaN where either ranks all tokens alike. Syncs.

    Raises
    ------
    LayoutError
        If the references' sizes differ.

    Examples
    --------
    >>> spearman([torch.tensor([0.1, 0.2, 0.3])], [torch.tensor([1.0, 5.0, 9.0])])
    [1.0]
    """
    sizes = tuple(len(s) for s in before), tuple(len(s) for s in after)
    if sizes[0] != sizes[1]:
        raise LayoutError(f"rankings must be of references of the same sizes, got {sizes[0]} and {sizes[1]}")
    return [_correlation(mean_ranks(a), mean_ranks(b)) for a, b in zip(before, after, strict=True)]


def overlap(before: Tensor, after: Tensor) -> float:
    """Share of the tokens `before` that are also among `after`, in [0, 1]; 1 where there are none. Syncs.

    Parameters
    ----------
    before, after : Tensor, shape (K,), int64
        Kept tokens without repetition.

    Examples
    --------
    >>> overlap(torch.tensor([1, 2, 3, 4]), torch.tensor([3, 4, 5, 6]))
    0.5
    """
    return float(torch.isin(before, after).float().mean()) if len(before) else 1.0


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())
