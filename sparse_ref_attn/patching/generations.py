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
from ..config import SparseRef
from ..errors import HandleRemovedError, IncompatibleError
from ..execution import Cache
from ..functional import pack_rows
from ..hooks.compiled import check_lengths, compiled_blocks
from ..hooks.diffusers import reset_step_cache, step_cache_active
from ..record import RunRecord
from ..run import Probing, Run
from ..types import TokenLayout
from .call import Execution, GenerationCall
from .execution.cache import ReferenceStore, check_cache
from .execution.depth import ByDepth, check_call
from .execution.model_cache import CacheKeeper
from .execution.tokens import AtInput
from .lengths import Lengths
from .ownership import Generation, Ownership, Where
from .pixels import PixelTap, encoder
from .proving import prepare_run
from .steps import ObservedSteps, RunStep

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
        if config.from_block or config.profile == "in_flight":
            adapter.check_depth(transformer)
        sites = adapter.sites(transformer)
        self._probing = Probing.of(config, [site.kind for site in sites])
        if self._probing.probes:
            adapter.check_measurable(transformer)
        check_cache(config, adapter, transformer)
        self.cache = None if adapter.cache is None else CacheKeeper(adapter, config)
        self.store = ReferenceStore(adapter, config) if isinstance(config.execute, Cache) else None
        self._owners = Ownership(pipe, adapter, config.clock)
        self._lengths = Lengths()
        self._latest: Generation | None = None
        self.record: RunRecord | None = None
        self.pixels: PixelTap | None = None
        self._calls = self._runs_heard = 0
        self._rests_for: int | None = None
        self.removed = False

    def install(self, transformer: nn.Module, undo: contextlib.ExitStack) -> None:
        """Listen to what the pipeline's VAE encodes, and to which thread its scheduler runs in."""
        self._owners.listen(undo)
        undo.callback(_forget_steps, weakref.ref(transformer))
        vae = getattr(None if self._pipe is None else self._pipe(), "vae", None)
        if isinstance(vae, nn.Module) and hasattr(vae, "encode"):
            self.pixels = PixelTap(vae)
            undo.callback(self.pixels.remove)

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

    def passed_by(self, transformer: nn.Module | None) -> str | None:
        """Why a run may have gone past the patch, in words; None where none did, as far as is seen."""
        pipe = None if self._pipe is None else self._pipe()
        used = getattr(pipe, "transformer", None)
        if isinstance(used, nn.Module) and not any(module is transformer for module in used.modules()):
            return "pipe.transformer is another one than the transformer that was patched: patch again"
        runs = self._owners.runs - self._runs_heard
        if runs > 0:
            return (
                f"the pipeline's scheduler was set {runs} times since the patched transformer was last called: such a "
                "run did not go through the transformer's own call (some codebases run a model through a function of "
                "its parts), so nothing was dropped in it"
            )
        return None

    def why_no_record(self, transformer: nn.Module | None) -> str:
        """Why there is no report, in words."""
        passed = self.passed_by(transformer)
        if passed is not None:
            return passed
        if self._owners.unknown is not None:
            return f"the layout of the calls since the patch was not known: {self._owners.unknown}"
        if self._calls:
            return "the calls since the patch had no reference tokens"
        return "got none since the patch"

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

    def call(self, module: nn.Module, kwargs: Kwargs) -> GenerationCall | None:
        """A call with the plan of its step; None where it has no references, or no known layout.

        Raises
        ------
        IncompatibleError
            If a batch runs on the transformer in another thread, or it cannot be told whose call this is.
        """
        began = time.perf_counter()
        self._calls, self._runs_heard = self._calls + 1, self._owners.runs
        if self._rests_for is not None:
            if self._rests_for != threading.get_ident():
                raise IncompatibleError(
                    "a transformer must not be called while a batch runs on it in another thread: wait for the batch, "
                    "or give each thread a transformer of its own (copy.deepcopy)"
                )
            return None
        reads = self.adapter.cached(kwargs)
        layout = None if reads else self._owners.layout(kwargs)
        if not reads and (layout is None or not layout.references):
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
        kind, kept = plan.kind, plan.kept(run.layout)
        if self.cache is not None and (reads or stores):
            execution = self.cache.execution(reads)
            reads = reads or self.cache.reuse.given is not None
            plan, kept = self.cache.plan(run, at, plan, reads)
            kind = "cached" if reads else plan.kind
        elif self.store is not None and run.refreshing is not None:
            execution, plan = self.store.execution(run, at, plan, kwargs)
            kind, kept = "cached" if plan.reads else plan.kind, plan.kept(run.layout)
        measures = plan.kind in ("profile", "in_flight") and run.calls(at.step) == 0
        rows = kwargs[self.adapter.tokens].shape[1]
        if layout is not None and not plan.from_block:
            rows += (0 if plan.reads else kept) - layout.reference_tokens
        explained = self._lengths.enter(module, (rows, kept), measures)
        step = run.step_record(at.step, kind, kept, plan)
        return GenerationCall(
            self.adapter,
            module,
            kwargs,
            run.layout if layout is None else layout,
            plan,
            execution,
            run=run,
            at=at,
            step=step,
            began=began,
            measures=measures,
            explained=explained,
        )

    def _as_it_is(self, module: nn.Module, kwargs: Kwargs) -> None:
        """A call that the library leaves alone."""
        x = kwargs.get(self.adapter.tokens)
        if isinstance(x, Tensor) and x.ndim > 1:
            self._lengths.enter(module, (x.shape[1], 0))

    def _check_compiled(self, module: nn.Module, at: RunStep, run: Run) -> None:
        """Refuse a budget with more lengths than compiled blocks may have."""
        if self._varies == "never" or self.config.budget.needs_mass:
            return
        if at.observed:
            check_lengths(module, None if self._varies == "every step" else 2, self.config.budget)
        else:
            planned = run.timeline.planned(at.total, run.budgeting, run.clock)
            check_lengths(module, len({step.kept for step in planned}), self.config.budget)

    def _begin(self, module: nn.Module, where: Where, layout: TokenLayout, kwargs: Kwargs) -> Generation:
        """Begin a generation at its first call."""
        self.record = self._latest = None
        self._owners.make_room(where)
        if step_cache_active(module) and self._varies == "every step":
            raise IncompatibleError(
                "a step cache needs a kept count that seldom changes, got a budget that changes at every step: "
                f"{self.config.budget}. Use budget.piecewise(n) or schedules.Constant, or disable the cache"
            )
        self._lengths.begin(module)
        if self.config.from_block or self._probing.first:
            check_call(self.adapter, module, kwargs)
        x, at = kwargs[self.adapter.tokens], where.at
        tokens = pack_rows(x, layout.reference_rows(x.device))
        pixels = [None] * len(layout.references) if self.pixels is None else self.pixels.take(layout, tokens)
        encode = None if self._pipe is None or self.pixels is None else encoder(self._pipe, self.adapter.encode)
        extracts = self.adapter.extracts(kwargs)
        refreshing = None if self.store is None or extracts else self.store.begin(module, at)
        reuse = self.cache.reuse if self.cache is not None and extracts else None
        scores = None if reuse is None else reuse.ranked(module, kwargs, layout, tokens)
        run = Run(self.config, self._probing, layout, tokens, pixels, at.total, at.clock, encode, scores, refreshing)
        run.record.notes += self.adapter.notes(kwargs)
        if extracts or refreshing is not None:
            run.record.exactness = "exact" if extracts else self.adapter.exactness(module)
        if reuse is not None:
            reuse.note(run.record)
        if self.store is not None and refreshing is not None:
            self.store.check_room(module, run, at, layout, kwargs)
        if compiled_blocks(module):
            if refreshing is None:
                self._check_compiled(module, at, run)
            else:
                run.record.notes.append("compiled blocks run uncompiled where keys and values are stored or read")
        prepare_run(self.adapter, module, layout, kwargs, run)
        return self._owners.add(where, run, kwargs)

    @property
    def _varies(self) -> str:
        """How the number of kept tokens changes over a run: "never", "pieces" or "every step"."""
        varies = self.config.budget.varies
        return "pieces" if varies == "never" and self._probing.probes else varies


def _forget_steps(known: weakref.ref[nn.Module]) -> None:
    """Empty a step cache that goes on without the patch: what it holds is of the length of the last call."""
    transformer = known()
    if transformer is not None and step_cache_active(transformer):
        reset_step_cache(transformer, for_good=True)
