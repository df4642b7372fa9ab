"""One cache object of a model, and its reference rows in rank order."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ...adapters.cache_hooks import LayerCache
from ...errors import BudgetError
from ...reference_cache import RankedCache
from ...run import Counts, Run, covering
from ...run.budgeting import scaled

__all__ = ["HeldRows"]


class HeldRows:
    """The rows of one cache that a run needs, ordered by its ranking.

    Parameters
    ----------
    run : Run
    layers : int
        Attention layers.
    tokens : Tensor, shape (K,), int64, optional
        Reference tokens that the model's own cache holds, ascending; None for all.
    limit : tuple of int
        Their counts.
    foreign : bool
        Whether `tokens` are an earlier run's choice, so that it must be seen that this run's are among them.
    """

    def __init__(self, run: Run, layers: int, tokens: Tensor | None, limit: Counts, foreign: bool = False) -> None:
        self._run, self.tokens, self.limit = weakref.ref(run), tokens, limit
        self.ranked: RankedCache | None = None
        self.released = False
        """Whether the model's own cache gave its rows up, and holds views of the ranked ones."""
        self.layers, self._foreign, self._factors = layers, foreign, run.config.layers
        self.idle: frozenset[int] = frozenset()
        self.moved: dict[int, Tensor] = {}
        """How far the rows of each layer moved when they were last taken anew (see `RankedCache.renew`)."""
        self._orders: dict[float, Tensor] = {}
        self._most: Counts = ()
        self._nested: tuple[Counts, ...] = ()
        self._ordered_by: object = None

    @property
    def run(self) -> Run:
        """The run whose rows these are; held weakly, so that the rows are gone with it."""
        run = self._run()
        assert run is not None
        return run

    def are_of(self, run: Run) -> bool:
        """Whether they are a run's."""
        return self._run() is run

    def reads(self, counts: Counts) -> list[int]:
        """Rows that each layer reads where the budget is `counts`."""
        by_factor = {factor: sum(scaled(counts, factor)) for factor in {self._factor(i) for i in range(self.layers)}}
        return [by_factor[self._factor(i)] for i in range(self.layers)]

    @property
    def complete(self) -> bool:
        """Whether the rows of every layer that attends were taken."""
        return self.ranked is not None and all(self.ranked.holds(i) for i in range(self.layers) if i not in self.idle)

    @property
    def nbytes(self) -> int:
        """Bytes of the ranked rows and the rooms beside them."""
        return 0 if self.ranked is None else self.ranked.row_bytes + self.ranked.room_bytes

    @property
    def bytes_of_all(self) -> int:
        """Bytes that the rows of every reference token would take."""
        return 0 if self.ranked is None else self.ranked.bytes_of(self.run.layout.reference_tokens)

    def scaled(self, counts: Counts, layer: int) -> Counts:
        """What a layer reads where the budget is `counts`."""
        return scaled(counts, self._factor(layer))

    def check(self, counts: Counts) -> None:
        """Raise BudgetError where tokens are asked for that are not held."""
        if any(count > held for count, held in zip(counts, self.limit, strict=True)):
            raise BudgetError(
                f"a step must keep tokens whose keys and values are held, {self.limit} of {self.run.budgeting.full}, "
                f"got a budget of {counts}"
            )

    def prepare(self, needs: Sequence[Counts], room: int) -> RankedCache:
        """Ranked rows for all of `needs`, to be filled layer by layer with `take`."""
        self._order(needs)
        self.ranked = RankedCache(self._rows(), room)
        return self.ranked

    def take(self, i: int, layer: LayerCache) -> None:
        """Put a layer's rows into rank order, or in the place of its earlier ones; where they are not needed as they
        were, hand back views."""
        assert self.ranked is not None
        k, v = layer.get()
        if self.ranked.holds(i):
            self.moved[i] = self.ranked.renew(i, k, v)
        else:
            self.ranked.store(i, k, v, self._positions(i))
        if self.released:
            layer.store(*self.ranked.prefix(i, self.ranked.rows[i]))

    def arrange(self, layers: Sequence[LayerCache], needs: Sequence[Counts], room: int, release: bool) -> None:
        """See that the rows of `needs`, of this step and of those to come, are held, and that this step's are a prefix.

        Rows that are needed no more are given back once they are a quarter of what is held. With
        `release` the model's own cache is needed no more either.
        """
        now, most = needs[0], covering(needs)
        self.check(most)
        if self.ranked is None:
            self.released = release
            self.prepare(needs, room)
            for i, layer in enumerate(layers):
                self.take(i, layer)
        assert self.ranked is not None
        moved = self.ranked.reserve(room)
        shrinks = 4 * sum(most) <= 3 * sum(self._most)
        stale = self._ordered_by is not self.run.ranking
        if stale or now not in self._nested or (shrinks and most not in self._nested):
            held = self._most
            self._order([*needs, held])
            if now not in self._nested:
                self._order([now, most, held])
            for i in filter(self.ranked.holds, range(self.layers)):
                self.ranked.rearrange(i, self._positions(i))
        if shrinks:
            self._most = most
            self.ranked.shrink(self._rows())
            moved = True
        if self.released or release:
            if moved or not self.released:
                for i, layer in enumerate(layers):
                    layer.store(*self.ranked.prefix(i, self.ranked.rows[i]))
            self.released = True

    def _order(self, needs: Sequence[Counts]) -> None:
        """Put tokens in an order of which each of `needs`, as far as they are nested, is a prefix."""
        most = covering(needs)
        nested = {*needs, most}
        self._orders = {}
        for i in range(self.layers):
            if self._factor(i) not in self._orders:
                scaled = {counts: self.scaled(counts, i) for counts in nested}
                self._orders[self._factor(i)], prefixes = self.run.ranking.prefixes(
                    [self.scaled(counts, i) for counts in (*needs, most)]
                )
                nested = {counts for counts in nested if scaled[counts] in prefixes}
        self._most, self._nested, self._ordered_by = most, tuple(nested), self.run.ranking

    def _rows(self) -> list[int]:
        return [sum(self.scaled(self._most, i)) for i in range(self.layers)]

    def _positions(self, i: int) -> Tensor:
        """Rows of the model's own cache that hold the ordered tokens."""
        order = self._orders[self._factor(i)]
        if self.tokens is None:
            return order
        if self._foreign and not bool(torch.isin(order, self.tokens).all()):
            raise BudgetError(
                f"a reused reference cache of {len(self.tokens)} tokens must hold those that the budget keeps, got a "
                "budget that keeps others: keep fewer, or reuse a cache of every token"
            )
        return torch.searchsorted(self.tokens, order)

    def _factor(self, i: int) -> float:
        return 1.0 if self._factors is None else self._factors[i]
