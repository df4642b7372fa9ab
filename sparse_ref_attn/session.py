"""The state of one generation: which step, what was measured, which tokens take part.

A run goes: `begin`, then for every step `plan` (same answer for every call of the step) and, in
profiling steps, `observe` once a block. Nothing here knows a model or a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import schedules
from .config import SparseRef
from .errors import BudgetError, ConfigError, NonFiniteError
from .profiling import AttentionView, Profile, first_blocks, top_quarter
from .record import RunRecord, Stability, StepRecord
from .schedules import Budget, Clock
from .selection import Reduced, Reducer, References, Selector, ranking
from .selection.base import scores_of
from .selection.stability import overlap, spearman
from .types import RefSelection, TokenLayout

__all__ = ["Plan", "Session"]


@dataclass(frozen=True)
class Plan:
    """What one step does.

    Parameters
    ----------
    kind : {"dense", "profile", "in_flight", "sparse"}
        "in_flight" is dense and measured before `from_block`, sparse from there on.
    selection : RefSelection, optional
        The kept tokens of a sparse step, of a profiling step that reads stored keys, and of an
        in-flight one when it has ranked.
    reduced : sequence of Reduced, optional
        The changed tokens of a sparse step, when a rival runs instead of a selector.
    from_block : int
        Block from which on only the kept tokens take part.
    """

    kind: str
    selection: RefSelection | None = None
    reduced: Sequence[Reduced] | None = None
    from_block: int = 0

    def kept(self, layout: TokenLayout) -> int:
        """Reference tokens that take part."""
        if self.selection is not None:
            return self.selection.kept
        if self.reduced is not None:
            return sum(r.positions.shape[0] for r in self.reduced)
        return layout.reference_tokens


class Session:
    """One generation at a time, for one patched transformer.

    Parameters
    ----------
    config : SparseRef
    kinds : sequence of str
        Kind of each attention block in order ("double", "single", ...).

    Raises
    ------
    ConfigError
        If a setting names a block that the model does not have.
    """

    def __init__(self, config: SparseRef, kinds: Sequence[str]) -> None:
        self.config = config
        self._blocks = len(kinds)
        probes = config.probes()
        self.in_flight = 0
        if config.profile == "in_flight":
            self.in_flight = first_blocks(probes, kinds, config.profile_blocks)
        if config.from_block and config.from_block >= len(kinds):
            raise ConfigError(f"from_block must lie below the model's {len(kinds)} blocks, got {config.from_block}")
        plain = [replace(p, value_norm=False) for p in probes if p.value_norm]
        self.profile = Profile([*probes, *plain], kinds, self.in_flight or None)
        self.record: RunRecord | None = None
        self.forget()

    def forget(self) -> None:
        """Drop everything that belongs to a run, but keep its record."""
        self.references: References | None = None
        self._clock: Callable[[int], Clock] | None = None
        self.profile.clear()
        self._scores: list[Tensor] | None = None
        self._order: Tensor | None = None
        self._again: int | None = None
        self._raised: tuple[int, ...] = ()
        self._floors: tuple[int, ...] = ()
        self._fixed: tuple[int, ...] | None = None
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._step: tuple[int, Plan] | None = None

    @property
    def varies(self) -> str:
        """How the number of kept tokens changes over a run: "never", "pieces" or "every step"."""
        assert isinstance(self.config.budget, Budget)
        if self.config.budget.varies == "never" and self.profile.probes:
            return "pieces"
        return self.config.budget.varies

    def begin(
        self,
        layout: TokenLayout,
        tokens: Tensor,
        pixels: Sequence[Tensor | None],
        total_steps: int,
        clock: Callable[[int], Clock],
        encode: Callable[[Tensor], tuple[Tensor, tuple[int, int]]] | None = None,
        ranked: Sequence[Tensor] | None = None,
    ) -> None:
        """Start a run. `tokens` (B, R, D) are the reference rows as the transformer gets them.

        `encode` makes such rows and their grid of pixels (see `References`). `ranked`, the scores of
        an earlier run, stand in place of the selector's.

        Raises
        ------
        NonFiniteError
            If the reference rows hold NaN or infinity (one sync).
        ConfigError, BudgetError
            If the settings cannot hold for these references.
        """
        self.forget()
        self.record = None
        if not bool(torch.isfinite(tokens).all()):
            raise NonFiniteError("the references' latents must be finite, got NaN or infinity")
        config = self.config
        late = sorted(step for step in self.profile.steps if step >= total_steps)
        if late:
            raise ConfigError(f"profiling steps must lie within the run's {total_steps} steps, got {late}")
        if config.weights is not None and len(config.weights) != len(layout.references):
            raise ConfigError(
                f"weights must be one a reference, got {len(config.weights)} for {len(layout.references)} references"
            )
        assert isinstance(config.budget, Budget)
        # Raises now, not after a dense profiling step, where the references have too few tokens.
        config.budget.counts(clock(0), layout.sizes, [torch.ones(size) for size in layout.sizes])
        self._floors = schedules.floors(config.floor, layout.sizes)
        self._raised = self._floors
        self._clock = clock
        generator = torch.Generator().manual_seed(config.seed)
        self.references = References(layout, tokens.detach(), list(pixels), {}, generator, encode)
        try:
            data: dict[str, Any] = config.to_dict()
        except ConfigError:
            data = {"description": config.describe()}
        self.record = RunRecord(
            layout, tokens.shape[0], total_steps, pixels=list(pixels), config=data, blocks=self._blocks
        )
        if ranked is not None or not self.profile.probes:
            self._rank(ranked)

    @property
    def ranked(self) -> bool:
        """Whether the run has ranked its references."""
        return self._scores is not None

    @property
    def version(self) -> tuple[bool, int]:
        """Changes when the run ranks, and ranks again."""
        assert self.record is not None
        return self.ranked, len(self.record.stability)

    @property
    def everything(self) -> tuple[int, ...]:
        """All tokens, as `counts`."""
        assert self.record is not None
        assert isinstance(self.config.budget, Budget)
        sizes = self.record.layout.sizes
        return (sum(sizes),) if self.config.budget.per == "all" else sizes

    def plan(self, step: int) -> Plan:
        """What step `step` does; asked again within the step, the same."""
        if self._step is None or self._step[0] != step:
            if self._again is not None and step != self._again:
                self._rank_again()
            if self.reranks(step) and self._scores is not None:
                self._again = step
                self.profile.repeat(step)
            self._step = (step, self._plan(step))
        return self._step[1]

    def reranks(self, step: int) -> bool:
        """Whether the attention is measured again in step `step`."""
        every, last = self.config.rerank_every, max(self.profile.steps, default=0)
        return every is not None and step > last and (step - last) % every == 0

    def _plan(self, step: int) -> Plan:
        if self.references is None or self._clock is None:
            raise BudgetError("a run must have begun before a step is planned")
        if self._scores is None:
            if step in self.profile.steps:
                return Plan("in_flight", from_block=self.in_flight) if self.in_flight else Plan("profile")
            if any(later >= step for later in self.profile.steps):
                return Plan("dense")
            if not self.profile.mass():
                self._note_blind()
                return Plan("dense")
            self._rank()
        return self._sparse(step)

    def _sparse(self, step: int) -> Plan:
        assert self._clock is not None
        counts = self._counts(self._clock(step))
        if self.reranks(step):
            return Plan("profile", self._chosen(counts).selection if self.config.execute == "cache" else None)
        return self._chosen(counts)

    def _chosen(self, counts: tuple[int, ...]) -> Plan:
        if counts not in self._plans:
            self._plans[counts] = self._choose(counts)
        return self._plans[counts]

    def counts(self, step: int) -> tuple[int, ...]:
        """Tokens that step `step` keeps: of each reference, or of all together (needs a ranking)."""
        assert self._clock is not None
        return self._counts(self._clock(step))

    def upcoming(self, steps: Iterable[int]) -> list[tuple[int, ...]]:
        """As `counts`, of each step; a step that measures, and every step before the ranking, needs all tokens."""
        return [self.counts(step) if self.ranked and not self.reranks(step) else self.everything for step in steps]

    def most(self, steps: Iterable[int]) -> tuple[int, ...]:
        """The counts that hold those of every step."""
        return tuple(max(each) for each in zip(*self.upcoming(steps), strict=True))

    def rank_order(self, counts: Sequence[tuple[int, ...]]) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
        """Tokens that any of several `counts` keeps, best first, and those `counts` whose choice is a prefix of it.

        Before the ranking: every token, in order.
        """
        assert isinstance(self.config.budget, Budget)
        if self._scores is None:
            assert self.references is not None
            return torch.arange(sum(self.references.sizes), device=self.references.tokens.device), tuple(counts)
        if self.config.budget.per == "all":
            assert self._order is not None
            return self._order[: max(sum(c) for c in counts)], tuple(counts)
        return ranking.nested_order(self._scores, counts)

    def arrive(self, step: int) -> Plan:
        """What the blocks of an in-flight step do after the measured ones: ranks in its first call."""
        assert self.record is not None
        plan = self.plan(step)
        if self._scores is None:
            if self.profile.mass():
                self._rank()
                rest = self._sparse(step)
                plan = Plan("profile") if rest.selection is None else replace(plan, selection=rest.selection)
            else:
                self._note_blind()
                plan = Plan("dense")
            self._step = (step, plan)
            own = self.record.steps[-1]
            own.kind, own.kept, own.from_block = plan.kind, plan.kept(self.record.layout), plan.from_block
            own.selection = plan.selection
        return plan

    def _note_blind(self) -> None:
        assert self.record is not None
        note = (
            f"every step runs dense: no attention was measured in the profiling steps {sorted(self.profile.steps)}; "
            "their calls must hold the reference tokens and go through the attention that is listened to"
        )
        if note not in self.record.notes:
            self.record.notes.append(note)

    def largest(self, steps: Sequence[int]) -> Plan:
        """A plan that keeps what any of `steps` keeps (needs a ranking)."""
        return self._chosen(self.most(steps))

    def observe(self, step: int, block: int, view: AttentionView) -> None:
        """Measure one attention call of a profiling step."""
        assert self.references is not None
        assert self.record is not None
        self.profile.observe(step, block, view, self.record)

    def _rank_again(self) -> None:
        """Score anew from what the last step measured; the ranking stays where nothing was measured."""
        assert self.record is not None
        assert self._scores is not None
        assert self._again is not None
        step, self._again = self._again, None
        if not self.profile.mass():
            self.record.notes.append(f"the ranking stays as it was: no attention was measured in step {step}")
            return
        counts = self.counts(step)
        before, kept = self._scores, self._choose(counts).selection
        self._plans, self._fixed, self._raised = {}, None, self._floors
        self._rank()
        after = self._choose(counts).selection
        same = 1.0 if kept is None or after is None else overlap(kept.indices, after.indices)
        self.record.stability.append(Stability(step, tuple(spearman(before, self._scores)), same))

    def _rank(self, given: Sequence[Tensor] | None = None) -> None:
        """Score once; every budget is then a prefix. One sync for the check of finiteness."""
        references, record = self.references, self.record
        assert references is not None
        assert record is not None
        references.attention = self.profile.mass()
        mass = next(
            (m for p, m in references.attention.items() if p.queries == "generation" and not p.value_norm), None
        )
        record.mass = None if mass is None else references.split(mass)
        select = self.config.select
        if isinstance(select, Reducer):
            self._scores = []
            return
        assert isinstance(select, Selector)
        scores = scores_of(select, references) if given is None else list(given)
        if not bool(torch.isfinite(torch.cat(scores)).all()):
            raise NonFiniteError(f"scores of {type(select).__name__} must be finite, got NaN or infinity")
        self._scores = record.scores = scores
        self._guard()
        self._order = ranking.order(scores, self._raised, self.config.weights)

    def _guard(self) -> None:
        guard, record = self.config.guard, self.record
        assert record is not None
        if guard is None or record.mass is None:
            return
        share = float(torch.stack([top_quarter(m[None])[0] for m in record.mass]).mean())
        if share >= guard.top_quarter:
            return
        counts = schedules.TopP(guard.mass).counts(Clock.uniform(0, 1), record.layout.sizes, record.mass)
        self._raised = tuple(
            size if count > guard.dense_above * size else max(count, floor)
            for count, size, floor in zip(counts, record.layout.sizes, self._floors, strict=True)
        )
        record.notes.append(
            f"the attention is spread evenly (top 25 % of the tokens hold {100 * share:.0f} % of the mass, below "
            f"{100 * guard.top_quarter:.0f} %), as in edits of the whole image: at least {sum(self._raised)} of "
            f"{record.layout.reference_tokens} reference tokens are kept"
        )

    def _counts(self, clock: Clock) -> tuple[int, ...]:
        """Tokens to keep; of a budget that never varies asked once a run, since `TopP` syncs."""
        assert isinstance(self.config.budget, Budget)
        if self.config.budget.varies != "never":
            return self._raised_counts(clock)
        if self._fixed is None:
            self._fixed = self._raised_counts(clock)
        return self._fixed

    def _raised_counts(self, clock: Clock) -> tuple[int, ...]:
        """The budget's counts, raised to floors and guard, rounded up to the multiple."""
        assert self.record is not None
        assert isinstance(self.config.budget, Budget)
        layout, budget = self.record.layout, self.config.budget
        counts = budget.counts(clock, layout.sizes, self.record.mass)
        shared = budget.per == "all"
        if shared:
            counts = (max(counts[0], sum(self._raised)),)
        else:
            counts = tuple(max(c, r) for c, r in zip(counts, self._raised, strict=True))
        if self.config.multiple == 1:
            return counts
        total = layout.reference_tokens
        other = layout.text + layout.rows - total
        extra = schedules.round_joint(sum(counts), other, self.config.multiple, total) - sum(counts)
        if shared:
            return (counts[0] + extra,)
        rounded = []
        for count, size in zip(counts, layout.sizes, strict=True):
            more = min(extra, size - count)
            rounded.append(count + more)
            extra -= more
        return tuple(rounded)

    def _choose(self, counts: tuple[int, ...]) -> Plan:
        assert self.references is not None
        assert isinstance(self.config.budget, Budget)
        sizes = self.references.sizes
        if sum(counts) >= sum(sizes):
            return Plan("dense")
        select = self.config.select
        if isinstance(select, Reducer):
            if len(counts) != len(sizes):
                counts = tuple(max(1, counts[0] * size // sum(sizes)) for size in sizes)
            return Plan("sparse", reduced=select.reduce(self.references, counts))
        if self.config.budget.per == "all":
            assert self._order is not None
            indices = ranking.prefix(self._order, counts[0])
        else:
            assert self._scores is not None
            indices = ranking.per_reference(self._scores, counts)
        return Plan("sparse", RefSelection(indices, sizes), from_block=self.config.from_block)

    def step_record(self, step: int, kind: str, kept: int, plan: Plan) -> StepRecord:
        """The record of `step`, made at its first call."""
        assert self.record is not None
        steps = self.record.steps
        if not steps or steps[-1].index != step:
            steps.append(StepRecord(step, kind, kept, selection=plan.selection, from_block=plan.from_block))
        return steps[-1]
