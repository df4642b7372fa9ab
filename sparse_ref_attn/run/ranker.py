"""From scores to an order of the reference tokens, and from counts to a selection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..selection import Reducer, References, ranking
from ..types import RefSelection
from .budgeting import Budgeting, Counts
from .plan import Plan

__all__ = ["Changed", "Order", "Ranked"]


class Order:
    """Every token in its own order: before anything is ranked.

    Parameters
    ----------
    references : References
    """

    known = False
    """Whether tokens are ranked, so that counts can be chosen."""

    def __init__(self, references: References) -> None:
        self.references = references
        self._plans: dict[Counts, Plan] = {}

    def choose(self, counts: Counts) -> Plan:
        """What a step does that keeps `counts`; the same plan for the same counts."""
        if counts not in self._plans:
            whole = sum(counts) >= sum(self.references.sizes)
            self._plans[counts] = Plan("dense") if whole else self._choose(counts)
        return self._plans[counts]

    def _choose(self, counts: Counts) -> Plan:
        return Plan("dense")

    def prefixes(self, counts: Sequence[Counts]) -> tuple[Tensor, tuple[Counts, ...]]:
        """Tokens that any of `counts` keeps, best first, (K,) int64, and those counts whose choice is a prefix."""
        return torch.arange(sum(self.references.sizes), device=self.references.tokens.device), tuple(counts)


class Ranked(Order):
    """Tokens by their scores: every count is a prefix.

    Parameters
    ----------
    references : References
    budgeting : Budgeting
    scores : sequence of Tensor, shapes (R_i,)
    """

    known = True

    def __init__(self, references: References, budgeting: Budgeting, scores: Sequence[Tensor]) -> None:
        super().__init__(references)
        self.scores = list(scores)
        self._shared, self._from_block = budgeting.shared, budgeting.config.from_block
        self._order = ranking.order(self.scores, budgeting.least, budgeting.config.weights)

    def _choose(self, counts: Counts) -> Plan:
        ranked, scores = self._order, self.scores
        kept = ranking.prefix(ranked, counts[0]) if self._shared else ranking.per_reference(scores, counts)
        return Plan("sparse", RefSelection(kept, self.references.sizes), from_block=self._from_block)

    def prefixes(self, counts: Sequence[Counts]) -> tuple[Tensor, tuple[Counts, ...]]:
        if self._shared:
            return self._order[: max(sum(c) for c in counts)], tuple(counts)
        return ranking.nested_order(self.scores, counts)


class Changed(Order):
    """Tokens that a rival changes instead of choosing among them."""

    known = True

    def __init__(self, references: References, reducer: Reducer) -> None:
        super().__init__(references)
        self._reducer = reducer

    def _choose(self, counts: Counts) -> Plan:
        sizes = self.references.sizes
        if len(counts) != len(sizes):
            counts = tuple(max(1, counts[0] * size // sum(sizes)) for size in sizes)
        return Plan("sparse", reduced=self._reducer.reduce(self.references, counts))
