"""What each step of a run does, of a configuration and a model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config import SparseRef
from ..cost import StepTokens
from ..execution import Cache
from ..record import mean_over_blocks
from ..run import Budgeting, Probing, Timeline
from ..run.timeline import PlannedStep
from ..schedules import Clock
from ..types import TokenLayout
from .cache import with_cache

__all__ = ["PlannedRun"]


@dataclass(frozen=True)
class PlannedRun:
    """The steps of a run, on the uniform clock; the budget must not look at the mass.

    Parameters
    ----------
    probing : Probing
    line : Timeline
    kinds : list of str
        As in `StepRecord`.
    kept : list of int
        Reference tokens that take part.
    from_block : list of int
        From which on only these take part.
    tokens : list of StepTokens
    stored : list of int
        Tokens of the steps that drop any or, with a cache, read it.
    """

    probing: Probing
    line: Timeline
    kinds: list[str]
    kept: list[int]
    from_block: list[int]
    tokens: list[StepTokens]
    stored: list[int]

    @classmethod
    def of(
        cls, config: SparseRef, sites: Sequence[Any], layout: TokenLayout, steps: int, kept_by_model: bool
    ) -> PlannedRun:
        """Of a model with these attention sites; `kept_by_model`: it keeps its references' keys and values itself.

        Raises
        ------
        ConfigError, BudgetError
            What a run of `steps` steps with such a layout would raise before it measures anything.
        """
        probing = Probing.of(config, [site.kind for site in sites])
        cached = isinstance(config.execute, Cache)
        line = Timeline.of(config, probing, stores=cached and not kept_by_model)
        clock = partial(Clock.uniform, steps=steps)
        line.check(steps)
        planned = line.planned(steps, Budgeting.of(config, layout, clock(0)), clock)
        kinds, kept = ["cached" if step.reads else step.kind for step in planned], [step.kept for step in planned]
        from_block = [step.from_block for step in planned]
        stored = [n for n, kind in zip(kept, kinds, strict=True) if kind in ("sparse", "cached")]
        tokens = [_rows(layout, step) for step in planned]
        if cached and kept_by_model:
            kinds, kept, tokens = with_cache(config, layout, kinds, kept)
        return cls(probing, line, kinds, kept, from_block, tokens, stored)

    def reads_all(self, total: int) -> bool:
        """Whether references are stored, and every step that reads them reads all `total` tokens."""
        return self.line.stores and all(step.cached in (0, total) for step in self.tokens)

    def mean(self, total: int, blocks: int) -> float:
        """Reference tokens of `total` that take part, mean over the steps and the `blocks` of each; where references
        are stored, over the steps that read them."""
        reads = [step.cached for step in self.tokens if step.cached] if self.line.stores else []
        if reads:
            return sum(reads) / len(reads)
        taken = zip(self.kept, self.from_block, strict=True)
        return sum(mean_over_blocks(kept, total, first, blocks) for kept, first in taken) / len(self.kept)


def _rows(layout: TokenLayout, step: PlannedStep) -> StepTokens:
    """The rows of a planned step."""
    if step.reads:
        return StepTokens(layout.text, layout.generation[1], 0, cached=step.kept)
    return StepTokens.of(layout, step.kept, step.from_block)
