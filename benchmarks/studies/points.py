"""Points: keys and values that stand for the reference tokens which a tile does not read.

G groups of queries (the text, then each tile), R reference tokens, X points, H heads, C head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

__all__ = ["WAYS", "Points", "Seen", "Way"]

ROUNDS = 10  # of k-means


@dataclass(frozen=True)
class Seen:
    """What a layer's points are made of.

    Parameters
    ----------
    keys, values : Tensor, shape (R, H, C)
        After RoPE.
    read : Tensor, shape (G, R), bool
    mass : Tensor, shape (G, R)
        Attention that a group gave each token in the last step with reference rows.
    queries : Tensor, shape (N, H, C)
        Of that step, of text and generation.
    lse : Tensor, shape (H, N)
    groups : Tensor, shape (N,)
        Each query's group.
    grids : tuple of (int, int)
        Of the references.
    turn : callable
        Offsets (R, 2) in rows and columns to the cosines and sines (R, C) of RoPE.
    """

    keys: Tensor
    values: Tensor
    read: Tensor
    mass: Tensor
    queries: Tensor
    lse: Tensor
    groups: Tensor
    grids: tuple[tuple[int, int], ...]
    turn: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def scale(self) -> float:
        return float(self.keys.shape[-1] ** -0.5)


@dataclass(frozen=True)
class Points:
    """Keys and values (X, H, C), and log of the number of tokens that each stands for, (G, H or 1, X).

    `spread` (X, H, C, C) is the covariance of a point's keys, `slope` (X, H, C, C) that of its keys (first) and values:
    half of the score's variance is added to the score, and to the value what it changes with the score.
    """

    keys: Tensor
    values: Tensor
    logs: Tensor
    spread: Tensor | None = None
    slope: Tensor | None = None

    def scores(self, q: Tensor, groups: Tensor, scale: float) -> Tensor:
        """Of queries (N, H, C), (H, N, X)."""
        found = torch.einsum("nhc,xhc->hnx", q, self.keys) * scale + self.logs[groups].transpose(0, 1)
        if self.spread is not None:
            found = found + torch.einsum("nhc,xhcd,nhd->hnx", q, self.spread, q) * (scale**2 / 2)
        return found

    def read(self, weights: Tensor, q: Tensor, scale: float) -> Tensor:
        """What weights (H, N, X) of queries (N, H, C) read, (N, H, C)."""
        found = torch.einsum("hnx,xhc->nhc", weights, self.values)
        if self.slope is not None:
            found = found + torch.einsum("hnx,nhc,xhcd->nhd", weights, q, self.slope) * scale
        return found


@dataclass(frozen=True)
class Way:
    """How points are made.

    Parameters
    ----------
    make : callable
        `Seen` to `Points`.
    cell : int
        Reference tokens that a point stands for, mean.
    work : callable
        Of the head dim, to the keys that one point costs a query as much as.
    """

    make: Callable[[Seen], Points]
    cell: int = 16
    work: Callable[[int], float] = lambda head_dim: 1.0


def _squares(seen: Seen, height: int, width: int) -> Tensor:
    """The cell of each token, (R,)."""
    found, count = [], 0
    for rows, columns in seen.grids:
        across = -(-columns // width)
        y, x = torch.arange(rows) // height, torch.arange(columns) // width
        found.append((count + y[:, None] * across + x).flatten())
        count += -(-rows // height) * across
    return torch.cat(found)


def _members(cells: Tensor, count: int | None = None) -> Tensor:
    """(R,) or (H, R) cells to (H or 1, X, R), 1 where a token is of a cell."""
    cells = cells if cells.ndim == 2 else cells[None]
    return functional.one_hot(cells, count or -1).transpose(1, 2).float()


def _logs(seen: Seen, members: Tensor) -> Tensor:
    """Log of each cell's tokens that each group does not read, (G, H or 1, X)."""
    return torch.einsum("gr,hxr->ghx", (~seen.read).float(), members).log()


def _pooled(members: Tensor, x: Tensor) -> Tensor:
    """Weighted means (X, H, C) of (R, H, C) by (H or 1, X, R)."""
    shares = members / members.sum(-1, keepdim=True).clamp_min(1e-20)
    return torch.einsum("hxr,rhc->xhc", shares.expand(x.shape[1], -1, -1), x)


def _of_members(seen: Seen, members: Tensor) -> Points:
    return Points(_pooled(members, seen.keys), _pooled(members, seen.values), _logs(seen, members))


def rectangles(seen: Seen, height: int = 4, width: int = 4) -> Points:
    """The mean key and value of each rectangle of a reference's grid: with squares, what `rest="means"` is."""
    return _of_members(seen, _members(_squares(seen, height, width)))


def centred(seen: Seen) -> Points:
    """Means of keys as they are before RoPE, which is then that of the middle of their square."""
    cells = _squares(seen, 4, 4)
    members = _members(cells)
    places = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in seen.grids]).float()
    shares = members[0] / members[0].sum(1, keepdim=True)
    moved = (shares @ places)[cells] - places
    keys = apply_rotary_emb(seen.keys[None], seen.turn(moved), sequence_dim=1)[0]
    return Points(_pooled(members, keys), _pooled(members, seen.values), _logs(seen, members))


def weighted(seen: Seen, share: float = 1.0) -> Points:
    """Means by the attention that all queries together gave the tokens; `share` of the weights, the rest is even."""
    members = _members(_squares(seen, 4, 4))
    even, by = members / members.sum(-1, keepdim=True), members * seen.mass[0]
    by = share * by / by.sum(-1, keepdim=True) + (1 - share) * even
    return Points(_pooled(by, seen.keys), _pooled(by, seen.values), _logs(seen, members))


def own(seen: Seen, by_mass: bool = False, spread: bool = False) -> Points:
    """Means for each group alone, of the tokens that it does not read (times the attention that it gave them), beside
    the covariance of their keys."""
    members, groups = _members(_squares(seen, 4, 4)), len(seen.read)
    weights = (~seen.read).float() * (seen.mass if by_mass else 1.0)
    by = (weights[:, None] * members).flatten(0, 1)[None]
    logs = _logs(seen, members)[:, 0]
    alone = torch.eye(groups)[:, :, None].log() + logs[:, None]
    keys = _pooled(by, seen.keys)
    varies = _covariance(by, seen.keys, keys, seen.keys, keys) if spread else None
    return Points(keys, _pooled(by, seen.values), alone.flatten(1)[:, None], varies)


def _covariance(members: Tensor, x: Tensor, mean_x: Tensor, y: Tensor, mean_y: Tensor) -> Tensor:
    """(X, H, C, C) of x and y (R, H, C) within the cells, whose means are given."""
    products = _pooled(members, (x[..., None] * y[..., None, :]).flatten(2))
    return products.view(*mean_x.shape, -1) - mean_x[..., None] * mean_y[..., None, :]


def fitted(seen: Seen) -> Points:
    """Means whose weight is such that, in the last step with reference rows, a group gives a square as much attention
    through its mean as it gave the tokens that it does not read."""
    points = rectangles(seen)
    given = torch.einsum("gr,xr->gx", seen.mass * ~seen.read, _members(_squares(seen, 4, 4))[0])
    flat = Points(points.keys, points.values, torch.zeros_like(points.logs))
    through = (flat.scores(seen.queries, seen.groups, seen.scale) - seen.lse[..., None]).exp().mean(0)
    sums = through.new_zeros(given.shape).index_add_(0, seen.groups, through)
    logs = (given / sums.clamp_min(1e-20)).log()
    return Points(points.keys, points.values, torch.where(points.logs[:, 0] > -torch.inf, logs, -torch.inf)[:, None])


def second_order(seen: Seen, whole: bool, values: bool = False) -> Points:
    """The variance of a square's keys, all of it or that of each channel; and how its values change with the score."""
    points, members = rectangles(seen), _members(_squares(seen, 4, 4))
    spread = _covariance(members, seen.keys, points.keys, seen.keys, points.keys)
    slope = _covariance(members, seen.keys, points.keys, seen.values, points.values) if values else None
    if not whole:
        spread = torch.diag_embed(spread.diagonal(dim1=-2, dim2=-1))
    return Points(points.keys, points.values, points.logs, spread, slope)


def halves(seen: Seen) -> Points:
    """Each square in two, at its mean along the direction in which its keys of all heads vary most."""
    cells, keys = _squares(seen, 4, 4), seen.keys.flatten(1)
    side = torch.zeros_like(cells)
    for cell in range(int(cells.max()) + 1):
        rows = (cells == cell).nonzero()[:, 0]
        moved = keys[rows] - keys[rows].mean(0)
        side[rows] = (torch.linalg.eigh(moved @ moved.T).eigenvectors[:, -1] > 0).long()
    return _of_members(seen, _members(2 * cells + side, 2 * (int(cells.max()) + 1)))


def alike(seen: Seen, heads: bool = False, height: int = 4, width: int = 4, values: bool = False) -> Points:
    """k-means of each reference's keys (beside values, each to its own scale) from the means of its rectangles, of all
    heads together or of each."""
    start, rows = _squares(seen, height, width), seen.keys
    if values:
        rows = torch.cat([rows / rows.var(0).sum(-1).mean().sqrt(),
                          seen.values / seen.values.var(0).sum(-1).mean().sqrt()], -1)  # fmt: skip
    rows = rows.transpose(0, 1) if heads else rows.flatten(1)[None]
    count = int(start.max()) + 1
    members = _members(start).expand(len(rows), -1, -1)
    sizes = [h * w for h, w in seen.grids]
    of = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    foreign = of[:, None] != of[torch.stack([(start == x).nonzero()[0, 0] for x in range(count)])]
    centres = torch.zeros(len(rows), count, rows.shape[-1])
    for _ in range(ROUNDS):
        filled = members.sum(-1, keepdim=True)
        centres = torch.where(filled > 0, members @ rows / filled.clamp_min(1), centres)
        nearest = torch.cdist(rows, centres).masked_fill(foreign, torch.inf).argmin(-1)
        members = _members(nearest, count)
    return _of_members(seen, members)


WAYS = {
    "means 4x4": Way(rectangles),
    "means 4x2": Way(partial(rectangles, width=2), 8),
    "means 2x2": Way(partial(rectangles, height=2, width=2), 4),
    "means 4x4 before RoPE": Way(centred),
    "means 4x4 by attention": Way(weighted),
    "means 4x4, half by attention": Way(partial(weighted, share=0.5)),
    "means 4x4 of what each tile does not read": Way(own),
    "means 4x4 of what each tile does not read, by attention": Way(partial(own, by_mass=True)),
    "means 4x4, weights fitted": Way(fitted),
    "second order, each channel": Way(partial(second_order, whole=False), work=lambda c: 1.5),
    "second order": Way(partial(second_order, whole=True), work=lambda c: 1 + c / 2),
    "second order, values too": Way(partial(second_order, whole=True, values=True), work=lambda c: 1 + c),
    "second order of what each tile does not read": Way(partial(own, spread=True), work=lambda c: 1 + c / 2),
    "4x4 in halves": Way(halves, 8),
    "alike, 16": Way(alike),
    "alike, 16, keys and values": Way(partial(alike, values=True)),
    "alike, 16, each head": Way(partial(alike, heads=True)),
    "alike, 8": Way(partial(alike, width=2), 8),
}
"""By their names in the rows; the number is of tokens a point."""
