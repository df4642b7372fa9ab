"""How many reference tokens a step keeps: integers from the budget, the floors, the guard and the multiple."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import schedules
from ..config import SparseRef
from ..errors import ConfigError
from ..schedules import Clock
from ..types import TokenLayout
from .profile import top_quarter

__all__ = ["Budgeting", "Counts", "covering", "scaled"]

Counts = tuple[int, ...]
"""Tokens of each reference, or, with a budget for all of them together (``per="all"``), of all as one number."""


def covering(counts: Iterable[Counts]) -> Counts:
    """The least counts that hold each of `counts`.

    Examples
    --------
    >>> covering([(4, 1), (2, 3)])
    (4, 3)
    """
    return tuple(max(each) for each in zip(*counts, strict=True))


def scaled(counts: Counts, factor: float) -> Counts:
    """A layer's share of what a step keeps, rounded up.

    Examples
    --------
    >>> scaled((10, 3), 0.5)
    (5, 2)
    """
    return tuple(math.ceil(factor * count) for count in counts)


@dataclass(frozen=True, eq=False)
class Budgeting:
    """The counts of one run's steps.

    Parameters
    ----------
    config : SparseRef
    layout : TokenLayout
        Of the run's first call.
    least : tuple of int
        Tokens of each reference that are kept at least: its floor, raised where the attention is even.
    mass : sequence of Tensor, optional
        Measured mass of each reference's tokens, (R_i,), for budgets that look at it.
    """

    config: SparseRef
    layout: TokenLayout
    least: Counts
    mass: Sequence[Tensor] | None = None
    _fixed: list[Counts] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def of(cls, config: SparseRef, layout: TokenLayout, clock: Clock) -> Budgeting:
        """Of a run that begins.

        Raises
        ------
        ConfigError
            If there is not a weight for each reference.
        BudgetError
            If the references have too few tokens: now, and not after a dense profiling step.
        """
        if config.weights is not None and len(config.weights) != len(layout.references):
            raise ConfigError(
                f"weights must be one a reference, got {len(config.weights)} for {len(layout.references)} references"
            )
        config.budget.counts(clock, layout.sizes, [torch.ones(size) for size in layout.sizes])
        return cls(config, layout, schedules.floors(config.floor, layout.sizes))

    @property
    def shared(self) -> bool:
        """Whether references compete for one number of tokens."""
        return self.config.budget.per == "all"

    @property
    def full(self) -> Counts:
        """Every token."""
        sizes = self.layout.sizes
        return (sum(sizes),) if self.shared else sizes

    def counts(self, clock: Clock) -> Counts:
        """Tokens to keep; of a budget that never varies asked once, since `TopP` syncs."""
        if self.config.budget.varies != "never":
            return self._counts(clock)
        if not self._fixed:
            self._fixed.append(self._counts(clock))
        return self._fixed[0]

    def _counts(self, clock: Clock) -> Counts:
        counts = self.config.budget.counts(clock, self.layout.sizes, self.mass)
        if self.shared:
            return self._rounded((max(counts[0], sum(self.least)),))
        return self._rounded(tuple(max(count, least) for count, least in zip(counts, self.least, strict=True)))

    def _rounded(self, counts: Counts) -> Counts:
        """With the joint length raised to the multiple."""
        if self.config.multiple == 1:
            return counts
        total = self.layout.reference_tokens
        other = self.layout.text + self.layout.rows - total
        extra = schedules.round_joint(sum(counts), other, self.config.multiple, total) - sum(counts)
        rounded = []
        for count, size in zip(counts, self.full, strict=True):
            more = min(extra, size - count)
            rounded.append(count + more)
            extra -= more
        return tuple(rounded)

    def measured(self, mass: Sequence[Tensor] | None) -> tuple[Budgeting, str | None]:
        """After the ranking: with the mass, and what the guard decided, in words (one sync where there is a guard)."""
        layout, guard = self.layout, self.config.guard
        known = replace(self, mass=mass, least=schedules.floors(self.config.floor, layout.sizes))
        if guard is None or mass is None:
            return known, None
        share = float(torch.stack([top_quarter(m[None])[0] for m in mass]).mean())
        if share >= guard.top_quarter:
            return known, None
        counts = schedules.TopP(guard.mass).counts(Clock.uniform(0, 1), layout.sizes, mass)
        least = tuple(
            size if count > guard.dense_above * size else max(count, floor)
            for count, size, floor in zip(counts, layout.sizes, known.least, strict=True)
        )
        return replace(known, least=least), (
            f"the attention is spread evenly (top 25 % of the tokens hold {100 * share:.0f} % of the mass, below "
            f"{100 * guard.top_quarter:.0f} %), as in edits of the whole image: at least {sum(least)} of "
            f"{layout.reference_tokens} reference tokens are kept"
        )
