"""How long a transformer's calls are, and what has to be done where that changes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.depth import Block
from ..errors import IncompatibleError
from ..hooks.compiled import compiled_blocks
from ..hooks.diffusers import reset_step_cache, step_cache_active
from ..hooks.foreign import ExplainedSizes, foreign_code
from ..hooks.static_blocks import Call, Rows, StaticBlocks
from ..run import Plan, Run
from ..schedules import Budget, Clock
from .steps import RunStep

__all__ = ["Lengths", "shape_of"]

_TIMES = 256
_REMEDY = "budget.piecewise(n), a larger multiple=... or schedules.Constant"

Explaining = AbstractContextManager[object]

Length = tuple[int, int]
"""Image rows of a call as it runs, and the reference tokens that take part in it (also as stored keys)."""


class Lengths:
    """The lengths of one patched transformer's calls: what a step cache has stored fits one of them."""

    def __init__(self) -> None:
        self._last: Length | None = None
        self._code: str | None = None
        self._static: StaticBlocks | None = None

    def begin(self, module: nn.Module, blocks: Sequence[Block], budget: Budget) -> None:
        """At the beginning of a generation: see what others put into the model's forward, and what they compiled.

        Raises
        ------
        IncompatibleError
            If a step cache is on, and the budget changes at every step.
        """
        if step_cache_active(module) and budget.varies == "every step":
            raise IncompatibleError(
                "a step cache needs a kept count that seldom changes, got a budget that changes at every step: "
                f"{budget}. Use budget.piecewise(n) or schedules.Constant, or disable the cache"
            )
        compiled = compiled_blocks(module)
        self._code = None if compiled else foreign_code(module)  # a mode would be a guard of the graphs
        static = StaticBlocks(module, [block.module for block in blocks]) if compiled else None
        self._static = static or None

    @staticmethod
    def leave(known: weakref.ref[nn.Module]) -> None:
        """The patch is off: a step cache that goes on holds what is of the length of the last call, and is emptied."""
        transformer = known()
        if transformer is not None and step_cache_active(transformer):
            reset_step_cache(transformer, for_good=True)

    def enter(self, module: nn.Module, length: Length, measures: bool = False) -> Explaining:
        """Before a call: a step cache forgets what it has stored of another length, or where the call `measures`.

        Returns
        -------
        context manager
            For the call: where somebody's code in the forward may have stored activations of another length, errors
            about sizes are explained.

        Raises
        ------
        IncompatibleError, VersionError
            If the step cache cannot forget (see `reset_step_cache`).
        """
        last, self._last = self._last, length
        if step_cache_active(module):
            if last != length or measures:
                reset_step_cache(module)
            return nullcontext()
        if self._code is None or last is None or last[0] == length[0]:
            return nullcontext()
        return ExplainedSizes(
            f"{self._code} was put there by others and failed in the first call of {length[0]} image rows after calls "
            f"of {last[0]}, as a step cache does that keeps activations of the step before (TeaCache and the like). "
            "This library resets those of diffusers and of cache-dit and knows no others: use a kept count that never "
            "changes (schedules.Constant, and a selector that measures no attention), or take the cache off"
        )

    def compiled(self, run: Run, at: RunStep, plan: Plan, kept: int, call: Call, eager: bool) -> Explaining | None:
        """Before a call of a run: see that torch may compile blocks for its length and for those of the steps to come.

        Parameters
        ----------
        run : Run
        at : RunStep
        plan : Plan
        kept : int
            Reference tokens whose rows run.
        call : tuple
            What else makes graphs (see `StaticBlocks`).
        eager : bool
            Whether the call is measured, up to the block where references leave, and so runs uncompiled.

        Returns
        -------
        context manager or None
            For the call; None where blocks are not compiled for one length each.

        Raises
        ------
        IncompatibleError
            If there are too many lengths.
        """
        static, whole = self._static, run.layout.reference_tokens
        if static is None:
            return None
        if eager:
            now = [rows for rows in _to_come(run, at)[:1] if plan.kind == "in_flight"]
        else:
            now = [Rows(kept, plan.from_block, whole)]
        if not (now and static.knows(now[0], call)):
            static.check([*now, *_to_come(run, at)], whole, call, run.config.budget, _REMEDY)
        return static.running(now[0], call) if now else nullcontext()


def shape_of(adapter: Adapter, run: Run, kwargs: Kwargs) -> Call:
    """What of a call of a run makes graphs, besides its reference tokens."""
    x, text = kwargs[adapter.tokens], kwargs.get(adapter.text_tokens or "")
    rows = (run.layout.generation[1], None if text is None else text.shape[1])
    return (torch.is_grad_enabled(), x.shape[0], x.dtype, rows, adapter.cached(kwargs), run.timeline.stores)


def _to_come(run: Run, at: RunStep) -> list[Rows]:
    """The steps that run compiled from this one on, as far as they are known."""
    if run.config.budget.needs_mass and not run.ranking.known:
        return []
    timeline, whole = run.timeline, run.layout.reference_tokens
    if timeline.stores and timeline.first == "all":
        return [Rows(whole), Rows(0)]
    if at.observed:  # nobody knows at which times the steps to come will be
        counts = {sum(run.budgeting.counts(Clock.uniform(i, _TIMES))) for i in range(_TIMES)}
        return [Rows(count, timeline.from_block, whole) for count in counts]
    planned = timeline.planned(at.total, run.budgeting, run.clock)[at.step :]
    return [
        Rows(0 if step.reads else step.kept, step.from_block, None if step.kind == "in_flight" else whole)
        for step in planned
        if step.kind != "profile"
    ]
