"""References by position ids, (frame, y, x, ...) of each row: found by them, and put in their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import LayoutError
from ..selection import Reduced
from ..types import Reference, TokenLayout
from .base import Found, Kwargs

__all__ = ["grid_of_ids", "place_by_ids", "references_from_ids"]


def references_from_ids(ids: Tensor, generation: int | None = None) -> Found | None:
    """Where the generation and its references lie, read off position ids; what a `PlainAdapter`'s `find` returns.

    The generation comes first. A reference is what has another frame, or the generation's own frame at positions
    beside the generation's (shifted to the right, say), as grids of two sides. One device-to-host copy.

    Parameters
    ----------
    ids : Tensor, shape (rows, >= 3) or (B, rows, >= 3)
        (frame, y, x, ...) of each row of the image stream, in any units; of a batch the first item counts.
    generation : int, optional
        Rows of the generation. Needed where a reference of its own frame lies below it and has the same columns, as
        both are then one grid.

    Returns
    -------
    ((int, int), tuple of Reference), or None
        First row and number of rows of the generation, and the references. None where ids of the generation's frame
        form no grids, or lie on one another: nobody can tell then what is a reference.

    Raises
    ------
    LayoutError
        If `generation` is not 1 to `rows`.

    Examples
    --------
    >>> grid = lambda f, h, w, left=0: torch.cartesian_prod(torch.tensor([f]), torch.arange(h), left + torch.arange(w))
    >>> references_from_ids(torch.cat([grid(0, 2, 2), grid(1, 1, 3)]))
    ((0, 4), (Reference(start=4, length=3, grid=(1, 3)),))
    >>> references_from_ids(torch.cat([grid(0, 2, 2), grid(0, 2, 3, left=2)]))
    ((0, 4), (Reference(start=4, length=6, grid=(2, 3)),))
    """
    table = (ids[0] if ids.ndim == 3 else ids)[:, :3].float().cpu()
    rows, frames = table.shape[0], table[:, 0]
    if generation is not None and not 1 <= generation <= rows:
        raise LayoutError(f"the generation must be 1 to {rows} rows, as many as there are ids, got {generation}")
    changed = (frames[1:] != frames[:-1]).nonzero().flatten() + 1
    edges = sorted({0, *changed.tolist(), rows, *([] if generation is None else [generation])})
    found: list[Reference] = []
    for start, stop in pairwise(edges):
        cells = table[start:stop, 1:3]
        if start and bool(frames[start] != frames[0]):
            found += _by_first_cell(start, cells)
            continue
        parts = [(0, stop)] if start == 0 and generation is not None else _grids(cells)
        if parts is None:
            return None
        found += [Reference(start + a, b - a, _grid(cells[a:b])) for a, b in parts]
    first, *references = found
    own = [table[r.start : r.start + r.length, 1:3] for r in references if frames[r.start] == frames[0]]
    if _overlap([table[: first.length, 1:3], *own]):
        return None
    return (0, first.length), tuple(references)


def _by_first_cell(start: int, cells: Tensor) -> list[Reference]:
    """The references of one frame: each begins at the first one's first cell."""
    again = (cells == cells[0]).all(1).nonzero().flatten().tolist()
    return [Reference(start + a, b - a, _grid(cells[a:b])) for a, b in pairwise([*again, cells.shape[0]])]


def _grids(cells: Tensor) -> list[tuple[int, int]] | None:
    """Rows of the grids that follow one another in `cells` (rows, 2); None where one of several has no two sides."""
    parts: list[tuple[int, int]] = []
    at, rows, thin = 0, cells.shape[0], False
    while at < rows:
        ys, xs = cells[at:].unbind(1)
        width = _leading((ys == ys[0]) & _rises(xs))
        lines = (rows - at) // width
        grid = cells[at : at + lines * width].reshape(lines, width, 2)
        after = torch.cat([cells[at + width :: width], cells.new_full((1, 2), torch.nan)])[:lines]
        ended = (after[:, 0] != grid[:, -1, 0]) | (after[:, 1] <= grid[:, -1, 1])
        alike = (grid[..., 1] == grid[0, :, 1]).all(1) & (grid[..., 0] == grid[:, :1, 0]).all(1) & ended
        height = _leading(alike & _rises(grid[:, 0, 0]))
        parts.append((at, at + width * height))
        at, thin = at + width * height, thin or 1 in (width, height)
    return None if thin and len(parts) > 1 else parts


def _rises(values: Tensor) -> Tensor:
    """Which values are greater than the one before; the first is."""
    return torch.cat([values.new_ones(1).bool(), values.diff() > 0])


def _leading(flags: Tensor) -> int:
    """How many are true from the first on."""
    return int(flags.long().cumprod(0).sum())


def _overlap(parts: Sequence[Tensor]) -> bool:
    """Whether a cell stands in two of the parts (rows, 2)."""
    cells = torch.cat(list(parts))
    return cells.unique(dim=0).shape[0] < cells.shape[0]


def grid_of_ids(ids: Tensor, layout: TokenLayout) -> tuple[int, int] | None:
    """The generation's grid from position ids (rows, >= 3): (frame, y, x, ...); None where it is none.

    Examples
    --------
    >>> ids = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(2), torch.arange(3))
    >>> grid_of_ids(ids, TokenLayout(6, 0, (0, 6), ()))
    (2, 3)
    """
    first, length = layout.generation
    return _grid(ids.reshape(-1, *ids.shape[-2:])[0, first : first + length, 1:3].float().cpu())


def place_by_ids(kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
    """Replace the reference rows of ``hidden_states`` and ``img_ids`` (frame, y, x, ...).

    A reduced token keeps its reference's frame and takes its position in the grid's own units.
    """
    x, ids = kwargs["hidden_states"], kwargs["img_ids"]
    rows, positions = [], []
    at = 0
    flat = ids.float()
    for reference, new in zip(layout.references, reduced, strict=True):
        rows.append(x[:, at : reference.start])
        rows.append(new.tokens.to(x.dtype))
        positions.append(flat[..., at : reference.start, :])
        origin = flat[..., reference.start : reference.start + 1, :]
        moved = origin.expand(*origin.shape[:-2], new.positions.shape[0], origin.shape[-1]).clone()
        moved[..., 1:3] += new.positions.to(moved)
        positions.append(moved)
        at = reference.start + reference.length
    rows.append(x[:, at:])
    positions.append(flat[..., at:, :])
    return {**kwargs, "hidden_states": torch.cat(rows, 1), "img_ids": torch.cat(positions, -2)}


def _grid(cells: Tensor) -> tuple[int, int] | None:
    """The grid whose cells (y, x) these are in reading order, if they are one."""
    ys, xs = cells[:, 0].unique(), cells[:, 1].unique()
    if len(ys) * len(xs) != len(cells) or not torch.equal(cells, torch.cartesian_prod(ys, xs).reshape(-1, 2)):
        return None
    return len(ys), len(xs)
