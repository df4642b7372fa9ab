"""Which generation and which step a transformer call belongs to, and what that step does."""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..config import SparseRef
from ..errors import HandleRemovedError, IncompatibleError
from ..functional import pack_rows
from ..hooks.diffusers import reset_step_cache, step_cache_active
from ..record import RunRecord
from ..run import Probing, Run
from ..types import TokenLayout
from .call import Execution, GenerationCall
from .execution.cache import CacheKeeper, check_cache
from .execution.depth import ByDepth, check_call
from .execution.tokens import AtInput
from .identity import RunIdentity
from .layouts import Layouts
from .pixels import PixelTap, encoder
from .steps import ManualSteps, ObservedSteps, PipelineSteps, RunStep

__all__ = ["Generations"]

logger = logging.getLogger("sparse_ref_attn")

Steps = PipelineSteps | ManualSteps | ObservedSteps


@dataclass
class _Generation:
    """A run, and how its calls are known."""

    run: Run
    key: object
    identity: RunIdentity
    last_kept: int | None = None


class Generations:
    """The generations of one patched transformer, one after another.

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
        keeps = adapter.cache is not None and adapter.cache.kept_by(transformer)
        check_cache(config, adapter, len(sites), keeps)
        self.cache = None if adapter.cache is None else CacheKeeper(adapter, config)
        reads = pipe is not None and PipelineSteps.reads(pipe)
        self._steps = PipelineSteps(pipe, config.clock) if reads else ObservedSteps()
        self._manual: tuple[ManualSteps, object] | None = None
        self._layouts, self._warned = Layouts(adapter, self._unknown), False
        self._current: _Generation | None = None
        self.record: RunRecord | None = None
        self.pixels: PixelTap | None = None
        self._paused = False
        self.removed = False

    def install(self, transformer: nn.Module, undo: contextlib.ExitStack) -> None:
        """Listen to what the pipeline's VAE encodes."""
        vae = getattr(None if self._pipe is None else self._pipe(), "vae", None)
        if isinstance(vae, nn.Module) and hasattr(vae, "encode"):
            self.pixels = PixelTap(vae)
            undo.callback(self.pixels.remove)

    def forget(self) -> None:
        """Let go of the last run, but keep its record; nothing may follow."""
        self.removed = True
        self._current = None
        if self.cache is not None:
            self.cache.forget()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, calls run as they are, and encoded images are not heard."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            if self.pixels is not None:
                self.pixels.handed_over()

    @property
    def run(self) -> Run | None:
        """The run that the last call with references belonged to."""
        return None if self._current is None else self._current.run

    # -- steps -------------------------------------------------------------------------------

    def begin(self, steps: int) -> None:
        """The user tells the steps of a run from now on."""
        self._alive()
        self._manual = (ManualSteps(steps), self._steps.run())

    def step(self, index: int) -> None:
        """The next calls belong to step `index`."""
        self._alive()
        if self._manual is None:
            raise IncompatibleError("handle.begin(steps=...) must be called before handle.step(i)")
        self._manual[0].set(index)

    def _leader(self) -> Steps:
        """Who tells the step: the user since `begin`, until the pipeline's own scheduler runs again."""
        if self._manual is not None and self._manual[1] is self._steps.run():
            return self._manual[0]
        return self._steps

    def _alive(self) -> None:
        if self.removed:
            raise HandleRemovedError("a handle must not be used after remove(); patch again")

    # -- one call ----------------------------------------------------------------------------

    def call(self, module: nn.Module, kwargs: Kwargs) -> GenerationCall | None:
        """A call with the plan of its step; None where it has no references, or no known layout."""
        began, steps = time.perf_counter(), self._leader()
        if self._paused:
            return None
        reads = self.adapter.cached(kwargs)
        layout = None if reads else self._layouts.of(kwargs, steps.run())
        at: RunStep | None = None
        if layout is not None and layout.references:
            at = self._enter(module, steps, layout, kwargs)
        elif reads and self._current is not None:
            at = steps.current(kwargs.get("timestep"))
        generation = self._current
        if at is None or generation is None or at.key is not generation.key:
            return None
        run, plan = generation.run, generation.run.plan(at.step)
        stores = self.cache is not None and layout is not None and self.adapter.extracts(kwargs)
        kind, execution = plan.kind, self._execution(plan.from_block)
        kept = plan.kept(run.layout)
        if self.cache is not None and (reads or stores):
            execution = self.cache.execution(reads)
            reads = reads or self.cache.reuse.given is not None
            plan, kept = self.cache.plan(run, at, plan, reads)
            kind = "cached" if reads else plan.kind
        step = run.step_record(at.step, kind, kept, plan)
        if not at.observed and not self._belongs(generation, step.calls, kwargs, layout):
            steps.restart()
            return self.call(module, kwargs)
        if generation.last_kept not in (None, kept) and step_cache_active(module):
            reset_step_cache(module)
        generation.last_kept = kept
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
            measures=plan.kind in ("profile", "in_flight") and step.calls == 0,
        )

    def _execution(self, from_block: int) -> Execution:
        return ByDepth() if from_block else AtInput()

    def _unknown(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("running dense: the layout of a call is not known (%s)", what)

    # -- which run ---------------------------------------------------------------------------

    def _enter(self, module: nn.Module, steps: Steps, layout: TokenLayout, kwargs: Kwargs) -> RunStep:
        """The step of a call with references; begins a run at its first call."""
        at, known = steps.current(kwargs.get("timestep")), self._current
        same = known is not None and at.key is known.key and known.run.layout.sizes == layout.sizes
        if known is not None and same and (not at.observed or self._same_references(known.run, kwargs, layout)):
            return at
        if at.observed and (at.step > 0 or (known is not None and at.key is known.key)):
            steps.restart()
            at = steps.current(kwargs.get("timestep"))
        self._current = self.record = None
        if step_cache_active(module) and self._varies == "every step":
            raise IncompatibleError(
                "a step cache needs a kept count that seldom changes, got a budget that changes at every step: "
                f"{self.config.budget}. Use budget.piecewise(n) or schedules.Constant, or disable the cache"
            )
        if self.config.from_block or self._probing.first:
            check_call(self.adapter, module, kwargs)
        run = self._begin(module, at, layout, kwargs)
        self.record = run.record
        self._current = _Generation(run, at.key, RunIdentity(timed=isinstance(steps, PipelineSteps)))
        return at

    def _begin(self, module: nn.Module, at: RunStep, layout: TokenLayout, kwargs: Kwargs) -> Run:
        tokens = self._reference_rows(kwargs, layout)
        pixels = [None] * len(layout.references) if self.pixels is None else self.pixels.take(layout, tokens)
        encode = None if self._pipe is None or self.pixels is None else encoder(self._pipe, self.adapter.encode)
        reuse = self.cache.reuse if self.cache is not None and self.adapter.extracts(kwargs) else None
        scores = None if reuse is None else reuse.ranked(module, kwargs, layout, tokens)
        run = Run(self.config, self._probing, layout, tokens, pixels, at.total, at.clock, encode, scores)
        if reuse is not None:
            reuse.note(run.record)
        return run

    @property
    def _varies(self) -> str:
        """How the number of kept tokens changes over a run: "never", "pieces" or "every step"."""
        varies = self.config.budget.varies
        return "pieces" if varies == "never" and self._probing.probes else varies

    def _reference_rows(self, kwargs: Kwargs, layout: TokenLayout) -> Tensor:
        x = kwargs[self.adapter.tokens]
        return pack_rows(x, layout.reference_rows(x.device))

    def _same_references(self, run: Run, kwargs: Kwargs, layout: TokenLayout) -> bool:
        """Whether the call's reference rows are the run's (syncs)."""
        rows, known = self._reference_rows(kwargs, layout), run.references.tokens
        return rows.shape == known.shape and torch.equal(rows, known)

    def _belongs(self, known: _Generation, calls: int, kwargs: Kwargs, layout: TokenLayout | None) -> bool:
        """Whether a call is of the run that began, and not of another one that nobody announced."""
        text = None if self.adapter.text_tokens is None else kwargs.get(self.adapter.text_tokens)
        return known.identity.agrees(
            calls,
            kwargs.get("timestep"),
            text,
            lambda: layout is None or self._same_references(known.run, kwargs, layout),
        )
