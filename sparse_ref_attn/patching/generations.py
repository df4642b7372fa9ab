"""Which generation and which step a transformer call belongs to, and what that step does."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.prompt import prompt_of
from ..adapters.stream import reference_tokens, stream_rows
from ..config import SparseRef
from ..errors import HandleRemovedError, IncompatibleError, SparseRefError
from ..execution import Cache
from ..record import RunRecord
from ..run import Run
from ..types import TokenLayout
from .attendance import Attendance
from .call import Execution, GenerationCall
from .execution.cache import ReferenceStore, reuse_of
from .execution.depth import ByDepth, check_call
from .execution.model_tiles import keeper_of
from .execution.tokens import AtInput
from .fitting import fit
from .lengths import Lengths, shape_of
from .ownership import Generation, Ownership, Where
from .pixels import PixelTap, encoder
from .proving import prepare_run
from .steps import ObservedSteps
from .trained import check_unchanged, isolation_of

__all__ = ["Generations"]

logger = logging.getLogger("sparse_ref_attn")


class Generations:
    """The generations of one patched transformer: one after another, within another's callback, or in threads.

    A call belongs to the generation of its thread that has its text, or its references. Nothing of another
    generation is ever read for it.

    Parameters
    ----------
    transformer : nn.Module
    pipe : diffusers pipeline, optional
        Whose scheduler tells the step, and whose VAE encodes references.
    config : SparseRef
    adapter : Adapter

    Raises
    ------
    ConfigError, IncompatibleError
        If the configuration does not fit the model.
    """

    def __init__(self, transformer: nn.Module, pipe: Any, config: SparseRef, adapter: Adapter) -> None:
        self.adapter, self.config = adapter, config
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._probing = fit(config, adapter, transformer)
        self._isolation = isolation_of(config.execute, transformer, adapter)
        self.cache = keeper_of(adapter, config)
        self.store = ReferenceStore(adapter, config, self._isolation) if isinstance(config.execute, Cache) else None
        self._owners = Ownership(pipe, adapter, config.clock)
        self._lengths = Lengths()
        self._latest: Generation | None = None
        self.record: RunRecord | None = None
        self.pixels: PixelTap | None = None
        self.attendance = Attendance(transformer, pipe, lambda: self._owners.runs)
        self._rests_for: int | None = None
        self.removed = False

    @property
    def isolates(self) -> bool:
        """Whether references run by themselves and are stored by the library."""
        return self.store is not None and self.store.own_pass is not None

    def install(self, transformer: nn.Module, undo: contextlib.ExitStack) -> None:
        """Listen to what the pipeline's VAE encodes, and to which thread its scheduler runs in."""
        self._owners.listen(undo, self._scheduled)
        undo.callback(self._lengths.leave, weakref.ref(transformer))
        if self.cache is not None and self.cache.hooks.kept_by(transformer):
            self.cache.install(transformer)
        elif self.store is not None:
            self.store.install(transformer)
        vae = getattr(None if self._pipe is None else self._pipe(), "vae", None)
        if isinstance(vae, nn.Module) and hasattr(vae, "encode"):
            self.pixels = PixelTap(vae)
            undo.callback(self.pixels.remove)

    def _scheduled(self) -> None:
        if not self.removed and self.attendance.scheduled():
            self._outdate()

    def forget(self) -> None:
        """Let go of all runs, but keep the record; nothing may follow."""
        self.removed = True
        self._latest = None
        self._owners.forget()
        if self.cache is not None:
            self.cache.forget()
        if self.store is not None:
            self.store.forget()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, calls of this thread run as they are, and encoded images are not heard."""
        self._rests_for = threading.get_ident()
        try:
            yield
        finally:
            self._rests_for = None
            if self.pixels is not None:
                self.pixels.handed_over()

    def went_past(self, module: nn.Module) -> None:
        """The transformer's parts ran without its own call: no report tells of that."""
        self.attendance.went_past()
        self._outdate()

    def _outdate(self) -> None:
        """Something ran that the last report does not tell of: noted in that of a run that goes on, otherwise gone."""
        latest, passed = self._latest, self.attendance.passed
        if latest is not None and passed is not None and self._owners.goes_on(latest):
            self._note(latest.run.record, f"since the first step of this run: {passed}")
        else:
            self.record = self._latest = None

    @staticmethod
    def _note(record: RunRecord, what: str) -> None:
        if what not in record.notes:
            record.notes.append(what)

    def report(self) -> RunRecord:
        """The record of the last run with references.

        Raises
        ------
        SparseRefError
            If there is none, or a later run went past the patch.
        """
        record, doubt = self.record, None if self.removed else self.attendance.doubt()
        if record is None or not record.steps:
            raise SparseRefError(f"a run with reference images must have taken place; {self.attendance.why_nothing()}")
        if doubt is not None:
            self.attendance.say(doubt)
            self._note(record, f"this may be the report of an earlier run: {doubt}")
        return record

    def leave(self) -> None:
        """The user takes the patch off."""
        if not self.removed:
            self.attendance.leave()

    @property
    def run(self) -> Run | None:
        """The run that the last call with references belonged to."""
        return None if self._latest is None else self._latest.run

    # -- steps -------------------------------------------------------------------------------

    def begin(self, steps: int) -> None:
        """The user tells the steps of a run from now on."""
        self._alive()
        self._owners.begin(steps)

    def step(self, index: int) -> None:
        """The next calls belong to step `index`."""
        self._alive()
        self._owners.step(index)

    def _alive(self) -> None:
        if self.removed:
            raise HandleRemovedError("a handle must not be used after remove(); patch again")

    # -- one call ----------------------------------------------------------------------------

    def call(self, module: nn.Module, kwargs: Kwargs, eager: bool = False) -> GenerationCall | None:
        """A call with the plan of its step; None where it has no references, or no known layout.

        Parameters
        ----------
        module : nn.Module
        kwargs : dict
        eager : bool
            Whether compiled blocks run uncompiled in it.

        Raises
        ------
        IncompatibleError
            If a batch runs on the transformer in another thread, or it cannot be told whose call this is.
        """
        began = time.perf_counter()
        if self._rests_for is not None:
            self.attendance.began()
            if self._rests_for != threading.get_ident():
                raise IncompatibleError(
                    "a transformer must not be called while a batch runs on it in another thread: wait for the batch, "
                    "or give each thread a transformer of its own (copy.deepcopy)"
                )
            return None
        self.attendance.came()
        reads = self.adapter.cached(kwargs)
        told = not reads or (self.cache is not None and self.cache.hooks.before_steps)
        layout = self._owners.layout(kwargs) if told else None
        if told and (layout is None or not layout.references):
            if layout is None:
                self.attendance.passed = f"the layout of its calls was not known: {self._owners.unknown}"
                self._outdate()
            self._as_it_is(module, kwargs)
            return None
        where = self._owners.find(kwargs, layout)
        if where is None:
            self._as_it_is(module, kwargs)
            return None
        generation, at = where.generation, where.at
        if generation is None:
            assert layout is not None
            generation = self._begin(module, where, layout, kwargs)
        self._latest, run = generation, generation.run
        self.record = run.record
        if at.observed:
            run.retime(at.total, at.clock)
        if isinstance(where.leader, ObservedSteps) and where.leader.rising:
            run.give_up("every step runs dense: the timesteps rise, as those of an inversion do")
        plan = run.plan(at.step)
        stores = self.cache is not None and layout is not None and self.adapter.extracts(kwargs)
        execution: Execution = ByDepth() if plan.from_block else AtInput()
        kind, kept, uncompiled = plan.kind, plan.kept(run.layout), False
        if self.cache is not None and (reads or stores):
            execution = self.cache.execution(reads)
            reads = reads or self.cache.reuse.given is not None
            plan, kept = self.cache.plan(run, at, plan, reads)
            kind = "cached" if reads else plan.kind
            uncompiled = self.cache.measures and (not reads or plan.kind == "profile")
        elif self.store is not None and run.refreshing is not None:
            execution, plan = self.store.execution(run, at, plan, kwargs)
            kind, kept = "cached" if plan.reads else plan.kind, plan.kept(run.layout)
            uncompiled = self.store.form.measures and not plan.reads
        measures = plan.kind in ("profile", "in_flight") and run.calls(at.step) == 0
        rows = stream_rows(self.adapter, kwargs)
        if layout is not None and not plan.from_block:
            rows += (0 if plan.reads or self.adapter.cached(kwargs) else kept) - layout.reference_tokens
        around = self._lengths.enter(module, (rows, kept), measures)
        if not eager and (self.store is None or self.store.stays_compiled(run)):
            shape, own = shape_of(self.adapter, run, kwargs), 0 if plan.reads else kept
            around = self._lengths.compiled(run, at, plan, own, shape, measures or uncompiled) or around
        step = run.step_record(at.step, kind, kept, plan)
        return GenerationCall(
            self.adapter, module, kwargs, run.layout if layout is None else layout, plan, execution,
            run=run, at=at, step=step, began=began, measures=measures, around=around,
        )  # fmt: skip

    def _as_it_is(self, module: nn.Module, kwargs: Kwargs) -> None:
        """A call that the library leaves alone."""
        x = kwargs.get(self.adapter.tokens)
        if isinstance(x, Tensor) and x.ndim > 1:
            self._lengths.enter(module, (stream_rows(self.adapter, kwargs), 0))

    def _begin(self, module: nn.Module, where: Where, layout: TokenLayout, kwargs: Kwargs) -> Generation:
        """Begin a generation at its first call."""
        self.record = self._latest = None
        check_unchanged(self._isolation, self.config.execute, module, self.adapter)
        self._owners.make_room(where)
        self._lengths.begin(module, self.adapter.blocks(module), self.config.budget)
        if self.config.from_block or self._probing.first:
            check_call(self.adapter, module, kwargs)
        at, tokens = where.at, reference_tokens(self.adapter, kwargs, layout)
        pixels = [None] * len(layout.references) if self.pixels is None else self.pixels.take(layout, tokens)
        encode = None if self._pipe is None or self.pixels is None else encoder(self._pipe, self.adapter.encode)
        own = self.adapter.extracts(kwargs) or self.adapter.cached(kwargs)  # the model keeps them itself
        refreshing = None if self.store is None or own else self.store.begin(module, at, layout, kwargs)
        keeper = self.cache if own else None
        reuse = reuse_of(keeper, self.store)
        scores = None if reuse is None else reuse.ranked(module, kwargs, layout, tokens)
        prompt, more = prompt_of(self.adapter, kwargs, layout), (at.total, at.clock, encode, scores, refreshing)
        run = Run(self.config, self._probing, layout, tokens, pixels, *more, prompt)
        run.record.notes += self.adapter.notes(kwargs)
        if own or refreshing is not None:
            run.record.exactness = "exact" if own or self.isolates else self.adapter.exactness(module)
        if keeper is not None:
            keeper.begin(module, run, kwargs)
        if self.store is not None and refreshing is not None:
            self.store.began(module, run, at, layout, kwargs)
        prepare_run(self.adapter, module, layout, kwargs, run)
        self.attendance.began()
        return self._owners.add(where, run, kwargs)
