"""Which generation a transformer call belongs to, and which step of it the call is."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.base import Adapter, Kwargs
from ..adapters.stream import reference_tokens
from ..errors import IncompatibleError
from ..run import Run
from ..types import TokenLayout
from .identity import RunIdentity
from .layouts import Layouts
from .steps import ManualSteps, ObservedSteps, PipelineSteps, RunStep

__all__ = ["Generation", "Ownership", "Where"]

logger = logging.getLogger("sparse_ref_attn")

Steps = PipelineSteps | ManualSteps | ObservedSteps

_MOST = 4  # generations that one thread may have begun and not ended, one within another's callback

_SYNCS = (
    "the step is read from the timestep, one device sync a call; "
    "call handle.begin(steps=...) and handle.step(i) to avoid it"
)
_ANOTHERS = (
    "the patched pipeline's scheduler does not run with the transformer (another pipeline drives it): "
    "the step is read from the timestep, one device sync a call"
)
_STANDS = (
    "the pipeline's scheduler stands still while the transformer runs (a loop that integrates by itself): "
    "the step is read from the timestep, one device sync a call; call handle.begin(steps=...) and handle.step(i)"
)


@dataclass
class Generation:
    """A run, who tells its steps, and how its calls are known.

    Parameters
    ----------
    run : Run
    leader : PipelineSteps, ManualSteps or ObservedSteps
    key : object
        Its identity, as the leader tells it.
    identity : RunIdentity
    left : object
        The scheduler's run that it followed until the scheduler was seen to stand still.
    """

    run: Run
    leader: Steps
    key: object
    identity: RunIdentity
    left: object = None


@dataclass(frozen=True)
class Where:
    """Where a call stands: the step as `leader` tells it, and the generation; None where one begins.

    `replaced` is the leader's last one, which is over then.
    """

    at: RunStep
    leader: Steps
    generation: Generation | None = None
    replaced: Generation | None = None


class _Thread(threading.local):
    """What belongs to the generations of one thread."""

    def __init__(self, adapter: Adapter, unknown: Callable[[str], None]) -> None:
        self.live: list[Generation] = []
        self.latest: Generation | None = None
        self.layouts = Layouts(adapter, unknown)


class Ownership:
    """Tells the generations of one patched transformer apart: in turn, within another's callback, or in threads.

    A call belongs to the generation of its thread that has its text, or its references.

    Parameters
    ----------
    pipe : diffusers pipeline, optional
        Whose scheduler tells the step of its own calls.
    adapter : Adapter
    clock : {"steps", "sigma"}
    """

    def __init__(self, pipe: Any, adapter: Adapter, clock: str) -> None:
        self._adapter = adapter
        self._scheduler = PipelineSteps(pipe, clock) if PipelineSteps.reads(pipe) else None
        self._manual: tuple[ManualSteps, object] | None = None
        self._said: set[str] = set()
        self.unknown: str | None = None
        """What was not known of the layout of the last call, in words."""
        self.forget()

    def forget(self) -> None:
        """Let go of all generations, those of other threads too."""
        self._here = _Thread(self._adapter, self._unknown)

    @property
    def runs(self) -> int:
        """How often the pipeline's scheduler was set since the patch."""
        return 0 if self._scheduler is None else self._scheduler.begun

    def listen(self, undo: contextlib.ExitStack, told: Callable[[], None]) -> None:
        """Note from now on which thread the pipeline runs in, and tell when a run of it begins."""
        if self._scheduler is not None:
            undo.callback(self._scheduler.listen(told))

    def begin(self, steps: int) -> None:
        """The user tells the steps of a run from now on."""
        self._manual = (ManualSteps(steps), self._scheduled())

    def step(self, index: int) -> None:
        """The next calls belong to step `index`."""
        if self._manual is None:
            raise IncompatibleError("handle.begin(steps=...) must be called before handle.step(i)")
        self._manual[0].set(index)

    def layout(self, kwargs: Kwargs) -> TokenLayout | None:
        """The layout of a call, looked up once a run; None, with one warning, where it is not known."""
        return self._here.layouts.of(kwargs, self._scheduled())

    def find(self, kwargs: Kwargs, layout: TokenLayout | None) -> Where | None:
        """Where a call stands; None for one without reference rows, `layout` None, that no generation can be of."""
        where = self._find(kwargs, layout)
        if where is not None and where.generation is not None:
            self._here.latest = where.generation
        return where

    def _find(self, kwargs: Kwargs, layout: TokenLayout | None) -> Where | None:
        if layout is None and not self._here.live:
            return None
        timestep = kwargs.get("timestep")
        leader, known = self._leader(kwargs, layout)
        at = self._current(leader, known, kwargs)
        if known is not None and known.key is at.key:
            if self._is_of(known, at, kwargs, layout):
                return Where(at, leader, known)
            if self._stands_still(known, kwargs, layout):
                known.leader = leader = ObservedSteps(known.identity.timestep, at.step)
                known.left, known.key = known.key, leader.key
                self._say(_STANDS, "stands")
                return Where(self._current(leader, known, kwargs), leader, known)
            if isinstance(leader, ManualSteps):
                leader.restart()
                at = leader.current(timestep)
            else:
                leader, known = self._watched(kwargs, layout)
                at = self._current(leader, known, kwargs)
                if known is not None and known.key is at.key and self._is_of(known, at, kwargs, layout):
                    return Where(at, leader, known)
        return None if layout is None else Where(at, leader, replaced=known)

    def _current(self, leader: Steps, known: Generation | None, kwargs: Kwargs) -> RunStep:
        if isinstance(leader, ObservedSteps):
            return leader.current(
                kwargs.get("timestep"), goes_on=known is not None and known.identity.knows(self._text(kwargs))
            )
        return leader.current(kwargs.get("timestep"))

    def _stands_still(self, known: Generation, kwargs: Kwargs, layout: TokenLayout | None) -> bool:
        """Whether a call is the next step of a run whose loop does not step the scheduler."""
        identity = known.identity
        same = isinstance(known.leader, PipelineSteps) and identity.stable and identity.knows(self._text(kwargs))
        return same and layout is not None and self._same_references(known.run, kwargs, layout)

    def make_room(self, where: Where) -> None:
        """Before a generation begins: what is over goes, so that its references are not held any longer."""
        scheduled, live = self._scheduled(), self._here.live
        kept = [g for g in live if g is not where.replaced and self._goes_on(g, scheduled)]
        live[:] = kept[1 - _MOST :]

    def add(self, where: Where, run: Run, kwargs: Kwargs) -> Generation:
        """The generation that begins with a call."""
        identity = RunIdentity(timed=isinstance(where.leader, PipelineSteps))
        identity.agrees(0, kwargs.get("timestep"), self._text(kwargs), lambda: True)
        generation = Generation(run, where.leader, where.at.key, identity)
        self._here.live.append(generation)
        self._here.latest = generation
        return generation

    # -- who tells the step --------------------------------------------------------------------

    def _leader(self, kwargs: Kwargs, layout: TokenLayout | None) -> tuple[Steps, Generation | None]:
        """Who tells the step of a call, and the generation that it may be of."""
        live, scheduled, text, timestep = self._here.live, self._scheduled(), self._text(kwargs), kwargs.get("timestep")
        if self._manual is not None and self._manual[1] is scheduled:  # until the pipeline's own scheduler runs again
            leader = self._manual[0]
            return leader, next((g for g in reversed(live) if g.leader is leader), None)
        known = next((g for g in reversed(live) if g.identity.knows(text)), None)
        if scheduled is not None and self._scheduler is not None and self._scheduler.is_here():
            owner = next((g for g in live if g.key is scheduled or g.left is scheduled), None)
            if known is None or isinstance(known.leader, PipelineSteps):
                follows = owner is None or (known in (None, owner) and owner.left is None)
            else:
                begins = not isinstance(known.leader, ObservedSteps) or known.leader.rises(timestep)
                follows = owner is None and begins
            if follows:
                return self._scheduler, owner
        return self._watched(kwargs, layout)

    def _watched(self, kwargs: Kwargs, layout: TokenLayout | None) -> tuple[ObservedSteps, Generation | None]:
        """As `_leader`, among the generations whose timesteps are watched."""
        text, timestep = self._text(kwargs), kwargs.get("timestep")
        for g in sorted(reversed(self._here.live), key=lambda g: not g.identity.knows(text)):
            if isinstance(g.leader, ObservedSteps) and (layout is None or self._same_references(g.run, kwargs, layout)):
                nested = g.identity.alive and not g.identity.knows(text) and g.leader.rises(timestep)
                left = g is not self._here.latest and not g.leader.follows(timestep)  # others came between its steps
                if not nested and not left:
                    return g.leader, g
        return self._observe(), None

    def _scheduled(self) -> object:
        """The run of the pipeline's scheduler; None where it is idle, or there is none."""
        return None if self._scheduler is None else self._scheduler.run()

    def _observe(self) -> ObservedSteps:
        self._say(_SYNCS if self._scheduler is None else _ANOTHERS, "observed")
        return ObservedSteps()

    # -- whose call ----------------------------------------------------------------------------

    def _is_of(self, known: Generation, at: RunStep, kwargs: Kwargs, layout: TokenLayout | None) -> bool:
        """Whether a call is of a generation, and not of another one that nobody announced."""
        if layout is not None and known.run.layout.sizes != layout.sizes:
            return False

        def same() -> bool:  # of an observed run they were compared already
            return layout is None or at.observed or self._same_references(known.run, kwargs, layout)

        return known.identity.agrees(known.run.calls(at.step), kwargs.get("timestep"), self._text(kwargs), same)

    def goes_on(self, generation: Generation) -> bool:
        """Whether further calls of a generation may come."""
        return self._goes_on(generation, self._scheduled())

    def _goes_on(self, generation: Generation, scheduled: object) -> bool:
        """Whether further calls may come: of the scheduler's run, or while somebody holds the text."""
        if isinstance(generation.leader, PipelineSteps):
            return generation.key is scheduled
        return generation.identity.alive

    def _text(self, kwargs: Kwargs) -> Tensor | None:
        return None if self._adapter.text_tokens is None else kwargs.get(self._adapter.text_tokens)

    def _same_references(self, run: Run, kwargs: Kwargs, layout: TokenLayout) -> bool:
        """Whether the call's reference rows are the run's (syncs); of a guided run, once its guidance ended, a part."""
        if self._adapter.guided_apart:
            return True
        rows, known = reference_tokens(self._adapter, kwargs, layout), run.references.tokens
        if len(rows) and len(known) % len(rows) == 0:
            rows = rows.repeat(len(known) // len(rows), 1, 1)
        return rows.shape == known.shape and torch.equal(rows, known)

    def _unknown(self, what: str) -> None:
        self.unknown = what
        self._say(f"running dense: the layout of a call is not known ({what})", "layout")

    def _say(self, what: str, once: str) -> None:
        if once not in self._said:
            self._said.add(once)
            logger.warning("%s", what)
