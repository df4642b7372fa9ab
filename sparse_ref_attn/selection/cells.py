"""Token cells: sharing out an image or a rectangle over the grid of tokens, by area."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["area_pool", "overlap"]


def overlap(pieces: Tensor, cells: Tensor) -> Tensor:
    """Share of each cell that each piece covers, along one axis.

    Parameters
    ----------
    pieces : Tensor, shape (P + 1,), float64
        Ascending borders of the pieces.
    cells : Tensor, shape (C + 1,), float64
        Ascending borders of the cells, in the same unit.

    Returns
    -------
    Tensor, shape (C, P), float64
        Rows sum to 1 where the pieces cover the cell.

    Examples
    --------
    >>> overlap(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 2.0])).tolist()
    [[0.5, 0.5]]
    """
    low = torch.maximum(pieces[:-1], cells[:-1, None])
    high = torch.minimum(pieces[1:], cells[1:, None])
    return (high - low).clamp(min=0) / (cells[1:] - cells[:-1])[:, None]


def area_pool(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of an image over each token's cell, each pixel weighted by the area it shares with the cell.

    Exact for any sizes, also where a cell is no whole number of pixels or smaller than one.

    Parameters
    ----------
    image : Tensor, shape (..., H, W)
        Any floating dtype.
    grid : (int, int)
        Height and width in tokens.

    Returns
    -------
    Tensor, shape (..., height * width)
        In the image's dtype; tokens run left to right, top to bottom.

    Examples
    --------
    >>> area_pool(torch.tensor([[1.0, 2.0, 3.0]]), (1, 2))
    tensor([1.3333, 2.6667])
    """
    rows, columns = (_shares(size, n).to(image) for size, n in zip(image.shape[-2:], grid, strict=True))
    return (rows @ image @ columns.T).flatten(-2)


def _shares(size: int, cells: int) -> Tensor:
    return overlap(_borders(size), _borders(cells))


def _borders(count: int) -> Tensor:
    return torch.arange(count + 1, dtype=torch.float64) / count
