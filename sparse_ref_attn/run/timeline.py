"""What each step of a run does, as far as the configuration and the probes say it before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config import SparseRef
from ..errors import ConfigError
from ..execution import Cache
from ..refresh import Refresh, standard
from ..schedules import Clock
from .budgeting import Budgeting
from .profile import Probing

__all__ = ["PlannedStep", "Timeline"]


@dataclass(frozen=True)
class PlannedStep:
    """One step: its kind as in `run.Plan`, the reference tokens that take part, and from which block on.

    `reads`: it runs no reference rows, and reads stored keys and values.
    """

    kind: str
    kept: int
    from_block: int
    reads: bool = False


@dataclass(frozen=True)
class Timeline:
    """What the steps of a run do.

    Parameters
    ----------
    measured : frozenset of int
        Steps in which the probes ask for attention; the run ranks after the last of them.
    in_flight : int
        Number of first blocks after which the dropped tokens leave a measured step; 0: they stay in it.
    from_block : int
        Block from which on dropped tokens are gone in the other steps.
    rerank_every : int, optional
        Measures again every so many steps after the last measured one.
    reads : bool
        Whether a step that measures again reads stored keys, and drops tokens all the same.
    stores : bool
        Whether the library stores keys and values in full steps for the others to read.
    refresh : Refresh, optional
        The full steps, where it does.
    first : {"all", "kept"}
        Reference tokens that a full step computes, as in `execution.Cache`.
    isolated : bool
        Whether the references run by themselves before the first step, and every step reads.

    Examples
    --------
    >>> from sparse_ref_attn.presets import ReCAST
    >>> from sparse_ref_attn.run import Probing
    >>> config = ReCAST(rerank_every=2)
    >>> line = Timeline.of(config, Probing.of(config, ["double", "single", "single"]))
    >>> [line.kind(step) for step in range(4)]
    ['profile', 'sparse', 'profile', 'sparse']
    """

    measured: frozenset[int]
    in_flight: int = 0
    from_block: int = 0
    rerank_every: int | None = None
    reads: bool = False
    stores: bool = False
    refresh: Refresh | None = None
    first: str = "all"
    isolated: bool = False

    @classmethod
    def of(cls, config: SparseRef, probing: Probing, stores: bool = False, isolated: bool = False) -> Timeline:
        """Of every run with a configuration and what it measures; `stores` and `isolated` as in the class."""
        way = config.execute
        reads, first = isinstance(way, Cache), way.first if isinstance(way, Cache) else "all"
        return cls(
            probing.steps, probing.first, config.from_block, config.rerank_every, reads, stores and reads,
            None if isolated else config.refresh, first, isolated,
        )  # fmt: skip

    @property
    def last(self) -> int:
        """The last step that must be measured before the run can rank; -1 without any."""
        return max(self.measured, default=-1)

    def check(self, steps: int) -> None:
        """Raise ConfigError where a run of `steps` steps would end before all is measured."""
        late = sorted(step for step in self.measured if step >= steps)
        if late:
            raise ConfigError(f"profiling steps must lie within the run's {steps} steps, got {late}")
        if self.stores and self.refresh is not None:
            self.refresh.check(steps)

    def reranks(self, step: int) -> bool:
        """Whether the attention is measured again in step `step`."""
        every, last = self.rerank_every, max(self.last, 0)
        return every is not None and step > last and (step - last) % every == 0

    def kind(self, step: int) -> str:
        """ "dense", "profile", "in_flight" or "sparse"."""
        if step in self.measured:
            return "in_flight" if self.in_flight else "profile"
        if step < self.last:
            return "dense"
        return "profile" if self.reranks(step) else "sparse"

    def in_flight_of(self, step: int) -> int:
        """Block after which the dropped tokens leave a measured step; 0 where they stay."""
        return self.in_flight if step in self.measured else 0

    def planned(self, steps: int, budgeting: Budgeting, clock: Callable[[int], Clock]) -> list[PlannedStep]:
        """Each of a run's steps in numbers; the budget must not look at the mass."""
        if self.stores:
            return self._stored(steps, budgeting, clock)
        total, out = budgeting.layout.reference_tokens, []
        for step in range(steps):
            kind, kept, first = self.kind(step), total, 0
            if kind in ("sparse", "in_flight") or (kind == "profile" and self.reads and self.reranks(step)):
                kept = sum(budgeting.counts(clock(step)))
                drops = kept < total
                first = (self.in_flight if kind == "in_flight" else self.from_block) if drops else 0
                kind = ("in_flight" if kind == "in_flight" else "sparse") if drops else _whole(kind)
            out.append(PlannedStep(kind, kept, first))
        return out

    def _stored(self, steps: int, budgeting: Budgeting, clock: Callable[[int], Clock]) -> list[PlannedStep]:
        """As `planned`, where references are computed in full steps and read in the others."""
        full = frozenset() if self.isolated else (self.refresh or standard(steps)).steps(steps)
        counts = [sum(budgeting.counts(clock(step))) for step in range(steps)]
        out, total = [], budgeting.layout.reference_tokens
        for step in range(steps):
            kind, ranked = self.kind(step), step > self.last
            if step in full or (step in self.measured and not self.isolated):
                computed = max(counts[step:]) if ranked and self.first == "kept" and not self.reranks(step) else total
                whole = "profile" if kind == "profile" else "dense"
                out.append(PlannedStep(whole if computed == total else "sparse", computed, 0))
            else:
                kept = counts[step] if ranked else total
                out.append(PlannedStep("profile" if kind == "profile" else "cached", kept, 0, reads=True))
        return out


def _whole(kind: str) -> str:
    """What a step is called that turns out to keep every token."""
    return "profile" if kind == "in_flight" else "dense"
