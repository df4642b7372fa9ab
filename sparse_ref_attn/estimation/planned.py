"""What each step of a run does, of a configuration and a model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config import SparseRef
from ..cost import StepTokens
from ..execution import Cache
from ..patching.execution.held_tiles import cells_of
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
    means : int
        Means of cells that a step reads beside a part of the tokens.
    ranked : frozenset of int
        Steps in which every layer is measured, for tiles that read a part until the next one: full ones, or those of a
        model's own cache that store or profile.
    """

    probing: Probing
    line: Timeline
    kinds: list[str]
    kept: list[int]
    from_block: list[int]
    tokens: list[StepTokens]
    stored: list[int]
    means: int = 0
    ranked: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        config: SparseRef,
        sites: Sequence[Any],
        layout: TokenLayout,
        steps: int,
        kept_by_model: bool,
        isolated: bool = False,
        whole: bool = False,
        before_steps: bool = False,
    ) -> PlannedRun:
        """Of a model with these attention sites; `kept_by_model`: it keeps its references' keys and values itself;
        `whole`: of all tokens, in the first step or `before_steps`; `isolated`: references run by themselves.

        Raises
        ------
        ConfigError, BudgetError
            What a run of `steps` steps with such a layout would raise before it measures anything.
        """
        probing = Probing.of(config, [site.kind for site in sites])
        cached = isinstance(config.execute, Cache)
        line = Timeline.of(config, probing, cached and not kept_by_model, isolated)
        clock = partial(Clock.uniform, steps=steps)
        line.check(steps)
        planned = line.planned(steps, Budgeting.of(config, layout, clock(0)), clock)
        kinds, kept = ["cached" if step.reads else step.kind for step in planned], [step.kept for step in planned]
        from_block = [step.from_block for step in planned]
        stored = [n for n, kind in zip(kept, kinds, strict=True) if kind in ("sparse", "cached")]
        tiled = isinstance(config.execute, Cache) and config.per == "tile"
        cells = cells_of(config.execute, layout) if isinstance(config.execute, Cache) and tiled else None
        means = 0 if cells is None else cells.count
        tokens, full = [_rows(layout, step, means) for step in planned], [not step.reads for step in planned]
        if whole:
            full = [kind == "profile" for kind in kinds]
            tokens = [_read(layout, n, means) for n in kept]
            first = "profile" if full[0] else "dense"
            if not before_steps:
                full[0], kept[0] = True, layout.reference_tokens
                tokens[0] = StepTokens.storing(layout, kept[0])
            kinds = ["cached" if i or before_steps else first for i in range(steps)]
            stored = [n for n, own in zip(kept, full, strict=True) if not own]
        elif cached and kept_by_model:
            full = [i == 0 or kind == "profile" for i, kind in enumerate(kinds)]
            kinds, kept, tokens = with_cache(config, layout, kinds, kept, means)
        parts = [kind == "cached" and n < layout.reference_tokens for kind, n in zip(kinds, kept, strict=True)]
        ranked = frozenset(i for i, own in enumerate(full) if tiled and own and any(parts[i:]))
        return cls(probing, line, kinds, kept, from_block, tokens, stored, means, ranked)

    def reads_all(self, total: int) -> bool:
        """Whether references are stored, and every step that reads them reads all `total` tokens."""
        return self.line.stores and all(kept == total for kept in self._read)

    def mean(self, total: int, blocks: int) -> float:
        """Reference tokens of `total` that take part, mean over the steps and the `blocks` of each; where references
        are stored, over the steps that read them."""
        if self.line.stores and self._read:
            return sum(self._read) / len(self._read)
        taken = zip(self.kept, self.from_block, strict=True)
        return sum(mean_over_blocks(kept, total, first, blocks) for kept, first in taken) / len(self.kept)

    @property
    def _read(self) -> list[int]:
        """Tokens of the steps that read what was stored."""
        return [kept for kept, kind in zip(self.kept, self.kinds, strict=True) if kind == "cached"]


def _rows(layout: TokenLayout, step: PlannedStep, means: int) -> StepTokens:
    """The rows of a planned step; with a part of the tokens it reads `means` besides."""
    return _read(layout, step.kept, means) if step.reads else StepTokens.of(layout, step.kept, step.from_block)


def _read(layout: TokenLayout, kept: int, means: int) -> StepTokens:
    """The rows of a step that reads `kept` stored tokens."""
    read = kept + (means if kept < layout.reference_tokens else 0)
    return StepTokens.reading(layout, read)
