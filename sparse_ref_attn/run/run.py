"""The state of one generation: made at its first call, asked at every step, gone with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import SparseRef
from ..errors import ConfigError, NonFiniteError
from ..record import RunRecord, Stability, StepRecord
from ..schedules import Clock
from ..selection import Reducer, References
from ..selection.base import scores_of
from ..selection.stability import overlap, spearman
from ..types import TokenLayout
from .budgeting import Budgeting, Counts, covering
from .plan import Plan
from .profile import AttentionView, Probing, Profile
from .ranker import Changed, Order, Ranked
from .refreshing import Refreshing
from .timeline import Timeline

__all__ = ["Run"]


class Run:
    """One generation: for every step `plan` (the same answer for every call of the step) and, in steps that measure,
    `observe` once a block.

    Parameters
    ----------
    config : SparseRef
    probing : Probing
        What is measured, and in which blocks of this model.
    layout : TokenLayout
        Of the first call.
    tokens : Tensor, shape (B, R, D)
        The reference rows as the transformer gets them.
    pixels : sequence of (Tensor or None)
        What the VAE encoded of each reference.
    steps : int
        Steps that the run is to have.
    clock : callable
        From a step number to the clock that budgets read.
    encode : callable, optional
        From pixels to reference rows and their grid (see `References`).
    scores : sequence of Tensor, optional
        Of an earlier run, in place of the selector's.
    refreshing : Refreshing, optional
        The full steps, where the library stores keys and values in them for the others to read.
    prompt : Tensor, shape (B, E), optional
        As in `References`.

    Raises
    ------
    NonFiniteError
        If the reference rows hold NaN or infinity (one sync).
    ConfigError, BudgetError
        If the settings cannot hold for these references.
    """

    def __init__(
        self,
        config: SparseRef,
        probing: Probing,
        layout: TokenLayout,
        tokens: Tensor,
        pixels: Sequence[Tensor | None],
        steps: int,
        clock: Callable[[int], Clock],
        encode: Callable[[Tensor], tuple[Tensor, tuple[int, int]]] | None = None,
        scores: Sequence[Tensor] | None = None,
        refreshing: Refreshing | None = None,
        prompt: Tensor | None = None,
    ) -> None:
        if not bool(torch.isfinite(tokens).all()):
            raise NonFiniteError("the references' latents must be finite, got NaN or infinity")
        self.config, self.layout, self.clock = config, layout, clock
        isolated = refreshing is not None and refreshing.isolated
        self.timeline = Timeline.of(config, probing, refreshing is not None, isolated)
        self.profile = Profile(probing)
        self.timeline.check(steps)
        self.refreshing = refreshing
        self.budgeting = Budgeting.of(config, layout, clock(0))
        generator = torch.Generator().manual_seed(config.seed)
        self.references = References(layout, tokens.detach(), list(pixels), {}, generator, encode, prompt)
        try:
            data: dict[str, Any] = config.to_dict()
        except ConfigError:
            data = {"description": config.describe()}
        blocks = len(probing.kinds)
        self.record = RunRecord(layout, tokens.shape[0], steps, pixels=list(pixels), config=data, blocks=blocks)
        self.ranking = Order(self.references)
        self._step: tuple[int, Plan] = (-1, Plan("dense"))
        self._measured_again: int | None = None
        self._given_up = False
        if scores is not None or not probing.probes:
            self._rank(scores)

    # -- what a step does ----------------------------------------------------------------------

    def plan(self, step: int) -> Plan:
        """What step `step` does; asked again within the step, the same."""
        if self._given_up:
            return self._everything
        if self._step[0] != step:
            if self._measured_again is not None:
                self._rank_again(self._measured_again)
            if self.timeline.reranks(step) and (self.ranking.known or self._try_to_rank()):
                self._measured_again = step
                self.profile.repeat(step)
            self._step = (step, self._plan(step))
        return self._step[1]

    def _plan(self, step: int) -> Plan:
        if not self.ranking.known:
            if step <= self.timeline.last:
                if self._reads(step) and step not in self.timeline.measured:
                    return Plan("cached", reads=True)
                kind, first = self.timeline.kind(step), self.timeline.in_flight_of(step)
                return Plan(kind, from_block=first, reads=self.timeline.isolated)
            if not self._try_to_rank():
                return self._everything
        chosen = self.ranking.choose(self.counts(step))
        if self.refreshing is not None:
            again = self.timeline.reranks(step)
            if self._reads(step):
                return Plan("profile" if again else "cached", chosen.selection, reads=True)
            kept = self.timeline.first == "kept" and not again
            return self.largest(range(step, self.record.total_steps)) if kept else Plan("profile" if again else "dense")
        if self.timeline.reranks(step):
            return Plan("profile", chosen.selection if self.timeline.reads else None)
        return chosen

    @property
    def _everything(self) -> Plan:
        """Of a step that cannot choose."""
        return Plan("cached", reads=True) if self.timeline.isolated else Plan("dense")

    def _reads(self, step: int) -> bool:
        """Whether a step reads what a full one stored."""
        return self.refreshing is not None and not self.refreshing.due(step)

    def arrive(self, step: int) -> Plan:
        """What the blocks of an in-flight step do after the measured ones: ranks in its first call."""
        plan = self.plan(step)
        if not self.ranking.known:
            if self._try_to_rank():
                rest = self.ranking.choose(self.counts(step))
                plan = Plan("profile") if rest.selection is None else replace(plan, selection=rest.selection)
            else:
                plan = Plan("dense")
            self._step = (step, plan)
            own = self.record.steps[-1]
            own.kind, own.kept, own.from_block = plan.kind, plan.kept(self.layout), plan.from_block
            own.selection = plan.selection
        return plan

    def observe(self, step: int, block: int, view: AttentionView) -> None:
        """Measure one attention call of a profiling step."""
        self.profile.observe(step, block, view, self.record)

    def observed(self, step: int, block: int, mass: Tensor) -> None:
        """Take the mass (B, R) of one attention call of a profiling step that somebody else measured."""
        self.profile.observed(step, block, mass.split(self.layout.sizes, -1), self.record)

    def step_record(self, step: int, kind: str, kept: int, plan: Plan) -> StepRecord:
        """The record of `step`, made at its first call; where one of its calls computes references, the step does."""
        steps = self.record.steps
        if not steps or steps[-1].index != step:
            steps.append(StepRecord(step, kind, kept, selection=plan.selection, from_block=plan.from_block))
        own = steps[-1]
        if own.kind == "cached" != kind:
            own.kind, own.kept, own.selection = kind, kept, plan.selection
        return own

    def calls(self, step: int) -> int:
        """Calls of `step` so far."""
        steps = self.record.steps
        return steps[-1].calls if steps and steps[-1].index == step else 0

    def retime(self, steps: int, clock: Callable[[int], Clock]) -> None:
        """Go by another number of steps and another clock from now on."""
        self.record.total_steps, self.clock = steps, clock

    def give_up(self, note: str) -> None:
        """Every step to come runs dense."""
        self._given_up = True
        if note not in self.record.notes:
            self.record.notes.append(note)

    # -- how many ------------------------------------------------------------------------------

    def counts(self, step: int) -> Counts:
        """Tokens that step `step` keeps, once the run has ranked."""
        return self.budgeting.counts(self.clock(step))

    def needed(self, steps: Iterable[int]) -> list[Counts]:
        """Tokens that each step needs: a step that measures, and every step before the ranking, all of them."""
        ranked, reranks = self.ranking.known, self.timeline.reranks
        return [self.counts(step) if ranked and not reranks(step) else self.budgeting.full for step in steps]

    def largest(self, steps: Iterable[int]) -> Plan:
        """A plan that keeps what any of `steps` keeps."""
        return self.ranking.choose(covering(self.needed(steps)))

    # -- ranking -------------------------------------------------------------------------------

    def _try_to_rank(self) -> bool:
        """Rank by what was measured; False, with a note, where nothing was."""
        if self.profile.mass():
            self._rank()
            return True
        steps = sorted(self.timeline.measured)
        note = (
            f"every step runs dense: no attention was measured in the profiling steps {steps}; "
            "their calls must hold the reference tokens and go through the attention that is listened to"
        )
        if note not in self.record.notes:
            self.record.notes.append(note)
        return False

    def _rank(self, given: Sequence[Tensor] | None = None) -> None:
        """Score once; every budget is then a prefix. One sync for the check of finiteness."""
        references, select = self.references, self.config.select
        references.attention = self.profile.mass()
        mass = next(
            (m for p, m in references.attention.items() if p.queries == "generation" and not p.value_norm), None
        )
        self.record.mass = None if mass is None else references.split(mass)
        if isinstance(select, Reducer):
            self.budgeting, _ = self.budgeting.measured(self.record.mass)
            self.ranking = Changed(references, select)
            return
        scores = scores_of(select, references) if given is None else list(given)
        if not bool(torch.isfinite(torch.cat(scores)).all()):
            raise NonFiniteError(f"scores of {type(select).__name__} must be finite, got NaN or infinity")
        self.record.scores = scores
        self.budgeting, note = self.budgeting.measured(self.record.mass)
        if note is not None:
            self.record.notes.append(note)
        self.ranking = Ranked(references, self.budgeting, scores)

    def _rank_again(self, step: int) -> None:
        """Score anew from what `step` measured; the ranking stays where nothing was measured."""
        self._measured_again = None
        if not self.profile.mass():
            self.record.notes.append(f"the ranking stays as it was: no attention was measured in step {step}")
            return
        counts, before = self.counts(step), self.ranking
        self._rank()
        if isinstance(before, Ranked) and isinstance(self.ranking, Ranked):
            kept, after = before.choose(counts).selection, self.ranking.choose(counts).selection
            same = 1.0 if kept is None or after is None else overlap(kept.indices, after.indices)
            ranks = tuple(spearman(before.scores, self.ranking.scores))
            self.record.stability.append(Stability(step, ranks, same))
