"""One patched transformer: the hooks, the run they follow, and the way back."""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SparseRef
from ..errors import HandleRemovedError, IncompatibleError, LayoutError
from ..functional import pack_rows
from ..packing import kept_rows
from ..record import RunRecord
from ..session import Plan, Session
from ..timing import Stopwatch, Stopwatches
from ..types import TokenLayout
from . import seams
from .base import Adapter, Found, Kwargs
from .caching import CachedCall, CacheKeeper, check_cache
from .depth import DepthCut, leaving
from .hooks import InstanceHook
from .pixels import PixelTap, encoder
from .steps import ManualSteps, ObservedSteps, PipelineSteps, RunStep
from .witness import RunWitness

__all__ = ["Patch"]

logger = logging.getLogger("sparse_ref_attn")


class _Call:
    """What the post-hook needs of the call that the pre-hook prepared."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.size = 0
        self.cut: DepthCut | None = None
        self.short: Any = None
        self.watch: Stopwatch | None = None
        self.device = torch.device("cpu")
        self.record: Any = None
        self.cache: CachedCall | None = None
        self.contexts = contextlib.ExitStack()
        self.listening = contextlib.ExitStack()


class Patch:
    """The state behind a handle. Holds the model weakly, so that a patched pipeline can be freed."""

    def __init__(self, transformer: nn.Module, pipe: Any, config: SparseRef, adapter: Adapter) -> None:
        self.transformer = weakref.ref(transformer)
        self.pipe = None if pipe is None else weakref.ref(pipe)
        self.adapter, self.config = adapter, config
        if config.from_block or config.profile == "in_flight":
            adapter.check_depth(transformer)
        self.session = Session(config, [site.kind for site in adapter.sites(transformer)])
        if self.session.profile.probes:
            adapter.check_measurable(transformer)
        keeps = adapter.cache is not None and adapter.cache.kept_by(transformer)
        check_cache(config, adapter, len(adapter.sites(transformer)), keeps)
        self.cache = None if adapter.cache is None else CacheKeeper(adapter, self.session)
        reads = pipe is not None and PipelineSteps.reads(pipe)
        self._steps = PipelineSteps(pipe, config.clock) if reads else ObservedSteps()
        self._manual: tuple[ManualSteps, object] | None = None
        self._key: object = None
        self._found: tuple[object, dict[object, Found | None]] = (None, {})
        self._witness = RunWitness(timed=False)
        self._call: _Call | None = None
        self._stored: Plan | None = None
        self._last_kept: int | None = None
        self._warned = False
        self.pixels: PixelTap | None = None
        self.removed = False
        self.paused = False
        self._undo = contextlib.ExitStack()

    def install(self) -> None:
        """Put the hooks on; everything that can be refused was refused before."""
        transformer = self.transformer()
        assert transformer is not None
        before, after = (InstanceHook(transformer, hook, "inference") for hook in (self._before, self._after))
        with contextlib.ExitStack() as undo:
            undo.callback(before.disarm)
            undo.callback(after.disarm)
            undo.callback(transformer.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(transformer.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
            for off in self.adapter.hooks(transformer, lambda: None if self._call is None else self._call.short):
                undo.callback(off)
            vae = getattr(None if self.pipe is None else self.pipe(), "vae", None)
            if isinstance(vae, nn.Module) and hasattr(vae, "encode"):
                self.pixels = PixelTap(vae)
                undo.callback(self.pixels.remove)
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Take everything off again. Safe to call twice, and in the middle of a run, between two calls."""
        self.removed = True
        self._close()
        self._undo.close()
        self.session.forget()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, the patch sees nothing: calls run as they are, and encoded images are not heard."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False
            if self.pixels is not None:
                self.pixels.handed_over()

    # -- steps -------------------------------------------------------------------------------

    def begin(self, steps: int) -> None:
        self._alive()
        self._manual = (ManualSteps(steps), self._steps.run())

    def step(self, index: int) -> None:
        self._alive()
        if self._manual is None:
            raise IncompatibleError("handle.begin(steps=...) must be called before handle.step(i)")
        self._manual[0].set(index)

    def _leader(self) -> PipelineSteps | ManualSteps | ObservedSteps:
        """Who tells the step: the user since `begin`, until the pipeline's own scheduler runs again."""
        if self._manual is not None and self._manual[1] is self._steps.run():
            return self._manual[0]
        return self._steps

    def _alive(self) -> None:
        if self.removed:
            raise HandleRemovedError("a handle must not be used after remove(); patch again")

    # -- one call ----------------------------------------------------------------------------

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[Any, ...], Kwargs] | None:
        began = time.perf_counter()
        self._close()
        if self.paused:
            return None
        steps = self._leader()
        kwargs = self.adapter.bind(module, args, kwargs)
        cached = self.adapter.cached(kwargs)
        layout = None if cached else self._layout(kwargs, steps.run())
        if layout is not None and not layout.references:
            return None
        if layout is None and not (cached and self.session.references is not None):
            return None
        run = steps.current(kwargs.get("timestep"))
        if layout is not None:
            run = self._enter(module, steps, run, layout, kwargs)
        elif run.key is not self._key:
            return None
        plan = self.session.plan(run.step)
        extracts = layout is not None and self.adapter.extracts(kwargs)
        resumes = extracts and self.cache is not None and self.cache.reuse.given is not None
        extracts, cached = extracts and not resumes, cached or resumes
        if plan.kind == "sparse" and extracts:
            whole = self.config.execute == "cache"
            plan = Plan("dense") if whole else self.session.largest(range(run.step, run.total))
            self._stored = None if whole else plan
        assert self.session.record is not None
        full = self.session.record.layout
        kept, kind = plan.kept(full), "cached" if cached else plan.kind
        if cached and plan.reduced is not None:  # the rows of the extract step, changed tokens have no fewer
            kept = full.reference_tokens if self._stored is None else self._stored.kept(full)
        record = self.session.step_record(run.step, kind, kept, plan)
        if not run.observed and not self._belongs(record.calls, kwargs, layout):
            steps.restart()
            return self._before(module, (), kwargs)
        self._clear_step_cache(module, kept)
        call = self._call = _Call()
        call.record, call.device = record, kwargs[self.adapter.tokens].device
        if cached:
            assert self.cache is not None
            if resumes:
                kwargs, call.cache = self.cache.resume(module, kwargs)
            kwargs = self.cache.read(call.contexts, module, kwargs, plan, run, record)
        else:
            assert layout is not None
            if extracts and self.cache is not None:
                dropped = plan if plan.kind == "sparse" else None
                call.cache = self.cache.filling(call.contexts, module, kwargs, dropped, run)
            if plan.kind in ("profile", "in_flight") and record.calls == 0:
                self._listen(call, module, layout, run.step)
            if plan.from_block:
                self._shorten_by_depth(call, module, layout, plan, run.step)
            else:
                kwargs = self._shorten(call, kwargs, layout, plan)
        if record.calls == 0:
            record.seconds = Stopwatches()
        record.calls += 1
        record.host_seconds += time.perf_counter() - began
        call.watch = Stopwatch(call.device)
        return (), kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> Any:
        call, self._call = self._call, None
        if call is None:
            return None
        if call.watch is not None:
            call.watch.stop(call.device)
        began = time.perf_counter()
        call.contexts.close()
        if output is None:
            return None
        if call.watch is not None:
            call.record.seconds.append(call.watch)
        if call.cut is not None:
            if not call.cut.reached:
                raise LayoutError("where references leave by depth, a later block must run in every call, and none did")
            call.rows = call.cut.kept
        if call.cache is not None and self.cache is not None:
            output = self.cache.after(call.cache, output, call.record)
        if call.rows is not None:
            output = self.adapter.restore(output, call.rows, call.size)
        call.record.host_seconds += time.perf_counter() - began
        return output

    def _close(self) -> None:
        if self._call is not None:
            self._call.contexts.close()
            self._call = None

    def _layout(self, kwargs: Kwargs, run: object) -> TokenLayout | None:
        x = kwargs.get(self.adapter.tokens)
        if x is None or x.ndim != 3:
            return self._unknown(f"{self.adapter.tokens!r} is missing or not (B, rows, D)")
        if run is None or run is not self._found[0]:
            self._found = (run, {})
        key, known = (x.shape[1], self.adapter.layout_key(kwargs)), self._found[1]
        if key not in known:
            known[key] = self.adapter.find(kwargs)
        found = known[key]
        if found is None:
            return self._unknown(f"{x.shape[1]} rows that the {self.adapter.name} adapter cannot tell apart")
        return self.adapter.layout(kwargs, found)

    def _unknown(self, what: str) -> TokenLayout | None:
        if not self._warned:
            self._warned = True
            logger.warning("running dense: the layout of a call is not known (%s)", what)
        return None

    def _enter(self, module: nn.Module, steps: Any, run: RunStep, layout: TokenLayout, kwargs: Kwargs) -> RunStep:
        """Begin a run at its first call; `layout` is of this call."""
        session = self.session
        x = kwargs[self.adapter.tokens]
        known = session.references
        same = run.key is self._key and known is not None and known.layout.sizes == layout.sizes
        if same and (not run.observed or self._same_references(kwargs, layout)):
            return run
        if run.observed and (run.step > 0 or run.key is self._key):
            steps.restart()
            run = steps.current(kwargs.get("timestep"))
        self._key, self._stored, self._last_kept = None, None, None
        self._witness = RunWitness(timed=isinstance(steps, PipelineSteps))
        if seams.step_cache_active(module) and session.varies == "every step":
            raise IncompatibleError(
                "a step cache needs a kept count that seldom changes, got a budget that changes at every step: "
                f"{self.config.budget}. Use budget.piecewise(n) or schedules.Constant, or disable the cache"
            )
        if self.config.from_block or self.session.in_flight:
            self._check_depth(module, kwargs)
        tokens = pack_rows(x, layout.reference_rows(x.device))
        pixels = [None] * len(layout.references) if self.pixels is None else self.pixels.take(layout, tokens)
        encode = None if self.pipe is None or self.pixels is None else encoder(self.pipe, self.adapter.encode)
        reuse = self.cache.reuse if self.cache is not None and self.adapter.extracts(kwargs) else None
        ranked = None if reuse is None else reuse.ranked(module, kwargs, layout, tokens)
        session.begin(layout, tokens, pixels, run.total, run.clock, encode, ranked)
        if session.record is not None:
            session.record.notes += self.adapter.notes(kwargs)
            if reuse is not None:
                reuse.note(session.record)
        self._key = run.key
        return run

    def _same_references(self, kwargs: Kwargs, layout: TokenLayout) -> bool:
        """Whether the call's reference rows are the run's (syncs)."""
        known, x = self.session.references, kwargs[self.adapter.tokens]
        rows = pack_rows(x, layout.reference_rows(x.device))
        return known is not None and rows.shape == known.tokens.shape and torch.equal(rows, known.tokens)

    def _belongs(self, calls: int, kwargs: Kwargs, layout: TokenLayout | None) -> bool:
        """Whether a call is of the run that began, and not of another one that nobody announced."""
        text = None if self.adapter.text_tokens is None else kwargs.get(self.adapter.text_tokens)
        return self._witness.agrees(
            calls, kwargs.get("timestep"), text, lambda: layout is None or self._same_references(kwargs, layout)
        )

    def _shorten(self, call: _Call, kwargs: Kwargs, layout: TokenLayout, plan: Plan) -> Kwargs:
        if plan.selection is not None:
            rows = kept_rows(layout, plan.selection)
            short = self.adapter.drop(kwargs, layout, rows)
            call.rows, call.size = rows, layout.rows
        elif plan.reduced is not None:
            short = self.adapter.replace(kwargs, layout, plan.reduced)
            first, length = layout.generation
            others = short[self.adapter.tokens].shape[1] - length
            if first == 0:
                call.rows = torch.arange(min(length + others, layout.rows), device=call.device)
            else:
                call.rows = torch.arange(layout.rows - length - others, layout.rows, device=call.device)
            call.size = layout.rows
        else:
            return kwargs
        call.short = (kwargs, plan, call.rows)
        return short

    def _check_depth(self, module: nn.Module, kwargs: Kwargs) -> None:
        why = None
        if seams.step_cache_active(module):
            why = "a step cache, which takes what it skips from a step of one length"
        elif seams.splits_the_sequence(module):
            why = "context parallelism, where a block sees a part of the rows"
        elif self.adapter.extracts(kwargs):
            why = "a pipeline that stores the references' keys and values of every block"
        if why is not None:
            raise IncompatibleError(
                f"where references leave by depth, a block must get every row of its own call, got {why}. "
                'Drop them at the input: from_block=0, profile="step"'
            )

    def _shorten_by_depth(self, call: _Call, module: nn.Module, layout: TokenLayout, plan: Plan, step: int) -> None:
        def choose() -> Tensor | None:
            rest = self.session.arrive(step) if plan.kind == "in_flight" else plan
            call.listening.close()
            return None if rest.selection is None else kept_rows(layout, rest.selection)

        cut, adapter = DepthCut(layout, choose), self.adapter
        call.cut, call.size = cut, layout.rows

        def shorten(kind: str, block: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
            kwargs = adapter.bind(block, args, kwargs)
            return adapter.drop_in_block(kind, kwargs, cut) if cut.arrive() else kwargs

        call.contexts.enter_context(leaving(adapter.blocks(module)[plan.from_block :], shorten))

    def _listen(self, call: _Call, module: nn.Module, layout: TokenLayout, step: int) -> None:
        if seams.splits_the_sequence(module):
            raise IncompatibleError(
                "attention cannot be measured under context parallelism, where each process sees its own part of the "
                "rows: use a selector and a budget that need none (edges, grid, a SavedRanking of a run in one "
                "process), or call disable_parallelism()"
            )

        def tap(block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
            if not self.session.profile.measures(step, block):
                return
            view = self.adapter.view(layout, q.detach(), k.detach(), v.detach(), mask)
            if view is not None:
                self.session.observe(step, block, view)

        call.contexts.enter_context(call.listening)
        call.listening.enter_context(seams.eager_blocks(module))
        call.listening.enter_context(self.adapter.listen(module, tap))

    def _clear_step_cache(self, module: nn.Module, kept: int) -> None:
        if self._last_kept not in (None, kept) and seams.step_cache_active(module):
            seams.reset_step_cache(module)
        self._last_kept = kept

    @property
    def record(self) -> RunRecord | None:
        return self.session.record
