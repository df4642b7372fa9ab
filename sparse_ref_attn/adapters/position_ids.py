"""References by position ids, (frame, y, x, ...) of each row: found by them, and put in their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..selection import Reduced
from ..types import Reference, TokenLayout
from .base import Found, Kwargs

__all__ = ["grid_of_ids", "place_by_ids", "references_from_ids"]


def references_from_ids(ids: Tensor) -> Found | None:
    """Generation and references from position ids (rows, >= 3): (frame, y, x, ...).

    The generation comes first; a reference is a run of rows with another frame, or one that
    starts its grid anew. One device-to-host copy.

    Examples
    --------
    >>> grid = lambda f, h, w: torch.cartesian_prod(torch.tensor([f]), torch.arange(h), torch.arange(w))
    >>> references_from_ids(torch.cat([grid(0, 2, 2), grid(1, 1, 3)]))
    ((0, 4), (Reference(start=4, length=3, grid=(1, 3)),))
    """
    table = ids[..., :3].float().cpu()
    if table.ndim == 3:
        table = table[0]
    frames = table[:, 0]
    changed = (frames[1:] != frames[:-1]).nonzero().flatten() + 1
    edges = [0, *changed.tolist(), table.shape[0]]
    generation = (0, edges[1])
    if any(bool(frames[start] == frames[0]) for start in edges[1:-1]):
        return None
    if len(edges) == 2 and _grid(table[:, 1:3]) is None:  # a reference beside the generation, with its frame
        return None
    references = []
    for start, stop in pairwise(edges[1:]):
        cells = table[start:stop, 1:3]
        again = (cells == cells[0]).all(1).nonzero().flatten().tolist()
        for a, b in zip(again, [*again[1:], stop - start], strict=True):
            references.append(Reference(start + a, b - a, _grid(cells[a:b])))
    return generation, tuple(references)


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
