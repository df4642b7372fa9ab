"""Which reference tokens each tile of a call's rows reads in each layer, by the attention that it paid them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .grid_tiling import Cells, Tiling

__all__ = ["TileRanking", "TileSelection"]

Counts = tuple[int, ...]
"""Tokens that each tile reads: of each reference, or, with one number, of all together."""


@dataclass(frozen=True)
class TileSelection:
    """What the tiles of one layer read, T of them, those of item 0 first.

    Parameters
    ----------
    indices : Tensor, shape (nnz,), int32
        Rows of the bank (B * R), tile by tile, the best first.
    offsets : Tensor, shape (T + 1,), int32
    known : tuple of int
        What `offsets` holds.
    bias : Tensor, shape (T, cells), float32, optional
        Log of the number of each cell's tokens that a tile does not read, -inf for none of them; None without cells.
    """

    indices: Tensor
    offsets: Tensor
    known: tuple[int, ...]
    bias: Tensor | None


class TileRanking:
    """The tiles' rankings in all layers: any number of tokens is a prefix.

    Parameters
    ----------
    tiling : Tiling
    sizes : tuple of int
        Tokens of each reference.
    cells : Cells, optional
    shared : bool
        Whether references compete for one number of tokens.
    floors : sequence of int
        Least tokens of each reference where they compete.
    weights : sequence of float, optional
        Importance of each reference where they compete.

    Notes
    -----
    No host sync but in `hide`. What a layer's tiles read is found once for each mass and number, not for each call.

    Examples
    --------
    >>> ranking = TileRanking(Tiling(0, (1, 2), 1), (4,), Cells(((1, 4),), 2))
    >>> ranking.rank(0, torch.tensor([[[0.1, 0.4, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]]]), (4,))
    >>> found = ranking.selection(0, (2,))
    >>> found.indices.tolist(), found.known, found.bias.exp().tolist()
    ([1, 3, 0, 1], (0, 2, 4), [[1.0, 1.0], [0.0, 2.0]])
    """

    def __init__(
        self,
        tiling: Tiling,
        sizes: tuple[int, ...],
        cells: Cells | None = None,
        shared: bool = False,
        floors: Sequence[int] = (),
        weights: Sequence[float] | None = None,
    ) -> None:
        self.tiling, self.sizes, self.cells = tiling, sizes, cells
        self._shared, self._floors, self._weights = shared, tuple(floors) or (0,) * len(sizes), weights
        self._starts = [0, *accumulate(sizes)]
        self._orders: dict[int, list[Tensor]] = {}
        self._tallies: dict[int, list[Tensor]] = {}
        self._found: dict[int, tuple[Counts, TileSelection]] = {}
        self._means: list[Tensor] = []
        self._offsets: dict[object, tuple[Tensor, tuple[int, ...]]] = {}
        self._tables: dict[str, Tensor] = {}
        self._seen: Tensor | None = None
        self._allowed: list[list[int]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the rankings, and of what the tiles read now."""
        held = [order for orders in self._orders.values() for order in orders]
        held += [x for _, found in self._found.values() for x in (found.indices, found.bias) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)

    def knows(self, counts: Counts) -> bool:
        """Whether the tiles have a ranking of so many tokens."""
        orders = next(iter(self._orders.values()), None)
        return orders is not None and all(o.shape[-1] >= n for o, n in zip(orders, counts, strict=True))

    def forget(self, layer: int) -> None:
        """The layer's mass is out of date."""
        for known in (self._orders, self._tallies, self._found):
            known.pop(layer, None)
        self._means = []

    def hide(self, seen: Tensor | None) -> None:
        """Say which tokens may be attended to, (B, R) bool, before layers are ranked; None for all (else it syncs)."""
        self._seen, self._allowed = seen, None
        self._tables.pop("cell sizes", None)
        if seen is not None:
            groups = [seen] if self._shared else list(seen.split(self.sizes, 1))
            self._allowed = torch.stack([group.sum(1) for group in groups], 1).tolist()

    def pooled(self, mass: Tensor) -> Tensor:
        """Mean attention of all the generation's queries, (B, R), from that of each tile, (B, tiles, R)."""
        return torch.einsum("btr,t->br", mass, self._shares_of(mass))

    def rank(self, layer: int, mass: Tensor, most: Counts) -> None:
        """Rank the layer's tokens for each of the generation's tiles; for the text by the sum over these.

        Parameters
        ----------
        layer : int
        mass : Tensor, shape (B, tiles, R), float32
            Mean attention of each tile's queries.
        most : tuple of int
            The largest numbers of tokens that are to be read.
        """
        scores = torch.cat([self.pooled(mass)[:, None], mass], 1) if self.tiling.text else mass
        if self._seen is not None:
            scores = scores.masked_fill(~self._seen[:, None], -math.inf)
        if self._shared:
            orders = [self._competing(scores)[..., : most[0]].int()]
        else:
            parts = zip(scores.split(self.sizes, -1), self._starts, most, strict=False)
            orders = [_sorted(part)[..., :top].add(at).int() for part, at, top in parts]
        self.forget(layer)
        self._orders[layer] = orders
        self._tallies[layer] = [self._tally(mass, i, orders[0 if self._shared else i]) for i in range(len(self.sizes))]

    def selection(self, layer: int, counts: Counts) -> TileSelection:
        """What the layer's tiles read of so many tokens; the same tensors until the layer is ranked again."""
        known = self._found.get(layer)
        if known is None or known[0] != counts:
            known = self._found[layer] = (counts, self._select(self._orders[layer], counts))
        return known[1]

    def read(self, counts: Counts) -> Tensor:
        """Of each reference the tokens that a query reads and the share of its mass that these have, means over the
        generation's queries, the layers and the items, (references, 2)."""
        if not self._means:
            tallies = zip(*self._tallies.values(), strict=True)
            self._means = [torch.stack([t.to(each[0].device) for t in each]).mean(0) for each in tallies]
        at = [counts[0 if self._shared else i] - 1 for i in range(len(self.sizes))]
        return torch.stack([means[:, n] for means, n in zip(self._means, at, strict=True)])

    # -- parts -----------------------------------------------------------------------------------

    def _competing(self, scores: Tensor) -> Tensor:
        """Order of all references' tokens: the floors' first, then by weighted score."""
        first = torch.ones_like(scores, dtype=torch.int8)
        for at, part, floor in zip(self._starts, scores.split(self.sizes, -1), self._floors, strict=False):
            first.scatter_(-1, _sorted(part)[..., :floor] + at, 0)
        if self._weights is not None:
            weighted = zip(scores.split(self.sizes, -1), self._weights, strict=True)
            scores = torch.cat([part * weight for part, weight in weighted], -1)
        ranked = _sorted(scores)
        if any(self._floors):
            ranked = ranked.gather(-1, first.gather(-1, ranked).sort(dim=-1, stable=True).indices)
        return ranked

    def _select(self, orders: list[Tensor], counts: Counts) -> TileSelection:
        items, tiles = orders[0].shape[:2]
        if self._allowed is None:
            blocks = [torch.cat([order[..., :n] for order, n in zip(orders, counts, strict=True)], -1)]
            lengths = [sum(counts)] * items
        else:
            tops = [[min(n, own) for n, own in zip(counts, allowed, strict=True)] for allowed in self._allowed]
            blocks = [
                torch.cat([order[i : i + 1, :, :n] for order, n in zip(orders, top, strict=True)], -1)
                for i, top in enumerate(tops)
            ]
            lengths = [sum(top) for top in tops]
        offsets, known = self._csr(lengths, tiles, blocks[0].device)
        at, rows, biases = 0, [], []
        for block in blocks:
            shift = torch.arange(at, at + len(block), dtype=torch.int32, device=block.device) * self._starts[-1]
            rows.append((block + shift[:, None, None]).flatten())
            biases.append(self._unread(block, at))
            at += len(block)
        bias = None if self.cells is None else torch.cat(biases)  # type: ignore[arg-type]
        return TileSelection(torch.cat(rows), offsets, known, bias)

    def _csr(self, lengths: list[int], tiles: int, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
        key = (*lengths, tiles, device)
        if key not in self._offsets:
            known = tuple(accumulate((n for n in lengths for _ in range(tiles)), initial=0))
            self._offsets = {key: (torch.tensor(known, dtype=torch.int32, device=device), known)}
        return self._offsets[key]

    def _unread(self, block: Tensor, item: int) -> Tensor | None:
        """Log of the cells' tokens not in `block` (b, tiles, n), which begins at `item`, (b * tiles, cells)."""
        if self.cells is None:
            return None
        sizes, of_tokens = self._cell_sizes(block.device), self._table("cells", self.cells.of_tokens, block.device)
        sizes = sizes if len(sizes) == 1 else sizes[item : item + len(block)]
        read = torch.zeros(*block.shape[:2], self.cells.count, device=block.device)
        found = of_tokens[block.long()]
        read.scatter_add_(2, found, torch.ones_like(found, dtype=read.dtype))
        return (sizes[:, None] - read).log().flatten(0, 1)

    def _cell_sizes(self, device: torch.device) -> Tensor:
        """Tokens of each cell that may be attended to, (1 or B, cells) float32."""
        assert self.cells is not None
        if "cell sizes" not in self._tables:
            seen = torch.ones(1, self._starts[-1], device=device) if self._seen is None else self._seen.float()
            of_tokens = self._table("cells", self.cells.of_tokens, device).expand(len(seen), -1)
            zeros = torch.zeros(len(seen), self.cells.count, device=device)
            self._tables["cell sizes"] = zeros.scatter_add_(1, of_tokens, seen)
        return self._tables["cell sizes"]

    def _tally(self, mass: Tensor, reference: int, order: Tensor) -> Tensor:
        """For each number of tokens, how many of a reference are read and their share of its mass, (2, n)."""
        first, last = self._starts[reference], self._starts[reference + 1]
        order, shares = order[:, order.shape[1] - mass.shape[1] :].long(), self._shares_of(mass) / len(mass)
        inside = (order >= first) & (order < last)
        if self._seen is not None:
            inside &= self._seen.gather(1, order.flatten(1)).view_as(order)
        got = torch.einsum("btn,t->n", mass.gather(-1, order) * inside, shares).cumsum(0)
        kept = torch.einsum("btn,t->n", inside.to(mass.dtype), shares).cumsum(0)
        total = torch.einsum("btr,t->", mass[..., first:last], shares)
        return torch.stack([kept, got / total.clamp_min(torch.finfo(mass.dtype).tiny)])

    def _shares_of(self, mass: Tensor) -> Tensor:
        sizes = torch.tensor(self.tiling.generation_sizes, dtype=torch.float64)
        return self._table("shares", (sizes / sizes.sum()).to(mass.dtype), mass.device)

    def _table(self, name: str, table: Tensor, device: torch.device) -> Tensor:
        if name not in self._tables or self._tables[name].device != device:
            self._tables[name] = table.to(device)
        return self._tables[name]


def _sorted(scores: Tensor) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices
