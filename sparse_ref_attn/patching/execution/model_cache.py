"""Reference K/V that a model itself keeps between steps, put in rank order and read by prefix."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import Adapter, Kwargs
from ...config import SparseRef
from ...errors import IncompatibleError, LayoutError
from ...execution import Cache
from ...hooks.compiled import compiled_blocks, eager_blocks
from ...hooks.diffusers import Attention, Route, dispatches, routed_attention, splits_the_sequence
from ...hooks.instance import InstanceHook
from ...ops.with_lse import attention_with_lse
from ...run import AttentionView, Plan, Run, covering
from ...selection import Reducer
from ..call import Execution, GenerationCall
from ..proving import prefers_bank
from ..reuse import CacheReuse
from ..steps import RunStep
from .held_rows import HeldRows
from .stored import to_stored
from .tokens import AtInput

__all__ = ["CacheKeeper"]


class Storing:
    """A call that runs the reference rows and fills a cache."""

    alone = False

    def __init__(self, keeper: CacheKeeper) -> None:
        self._keeper, self._rows = keeper, AtInput()

    def before(self, call: GenerationCall) -> Kwargs:
        self._held = self._keeper.fill(call)
        return self._rows.before(call)

    def after(self, call: GenerationCall, output: Any) -> Any:
        self._keeper.take_charge(call, self._held, output)
        return self._rows.after(call, output)


class Reading:
    """A call on text and generation rows that attends to stored K/V; `resumes`: to those of an earlier run."""

    alone = False

    def __init__(self, keeper: CacheKeeper, resumes: bool) -> None:
        self._keeper, self._resumes = keeper, resumes
        self._cache: Any = None

    def before(self, call: GenerationCall) -> Kwargs:
        kwargs = call.kwargs
        if self._resumes:
            kwargs, self._cache = self._keeper.resume(call)
        return self._keeper.read(call, kwargs)

    def after(self, call: GenerationCall, output: Any) -> Any:
        return self._keeper.hooks.returned(output, self._cache) if self._resumes else output


class CacheKeeper:
    """Follows the caches of one patched transformer; a cache is forgotten with the model's own object.

    Parameters
    ----------
    adapter : Adapter
        Of a family with a `CacheHooks`.
    config : SparseRef
    """

    def __init__(self, adapter: Adapter, config: SparseRef) -> None:
        assert adapter.cache is not None
        self._adapter, self._config, self.hooks = adapter, config, adapter.cache
        self._held: weakref.WeakKeyDictionary[Any, HeldRows] = weakref.WeakKeyDictionary()
        self._stored: tuple[Run, Plan] | None = None
        self.reuse = CacheReuse(adapter, config, adapter.cache.conditions)

    def plan(self, run: Run, at: RunStep, plan: Plan, reads: bool) -> tuple[Plan, int]:
        """What a call of a step with `plan` does that reads a cache, or stores; and the reference tokens in it."""
        if not reads and plan.kind == "sparse":
            whole = isinstance(self._config.execute, Cache) and self._config.execute.first == "all"
            plan = Plan("dense") if whole else run.largest(range(at.step, at.total))
            self._stored = (run, plan)
        if reads and plan.reduced is not None:  # the rows of the step that stored; changed tokens have no fewer
            stored = self._stored[1] if self._stored is not None and self._stored[0] is run else Plan("dense")
            return plan, stored.kept(run.layout)
        return plan, plan.kept(run.layout)

    def forget(self) -> None:
        """Let go of the last run."""
        self._stored = None

    def execution(self, reads: bool) -> Execution:
        """Of a call that reads a cache, or of one that stores; where an earlier run's cache is given, it is read."""
        return Reading(self, resumes=not reads) if reads or self.reuse.given is not None else Storing(self)

    # -- the call that fills a cache -----------------------------------------------------------

    def fill(self, call: GenerationCall) -> HeldRows:
        """Before a call that stores.

        Where the ranking is known and no later step needs all rows, each layer's rows go into rank
        order as soon as they are stored, so that the whole cache never exists.
        """
        run, at, dropped = call.run, call.at, call.plan.selection if call.plan.kind == "sparse" else None
        sites, later = self._adapter.sites(call.module), range(at.step + 1, at.total)
        if splits_the_sequence(call.module):
            raise IncompatibleError(
                "a model that keeps its references' keys and values cannot run under context parallelism: diffusers "
                "splits their rows over the ranks, and each rank's attention sees its own alone. Call "
                "disable_parallelism(), or use a pipeline without the cache"
            )
        if dropped is None:
            held = HeldRows(run, len(sites), None, run.budgeting.full)
        else:
            held = HeldRows(run, len(sites), dropped.indices, covering(run.needed([at.step, *later])))
        whole = self.reuse.wants(call.module, call.kwargs, run.layout, run.references.tokens)
        eager = not torch.is_grad_enabled() and not compiled_blocks(call.module) and all(s.module for s in sites)
        early = run.ranking.known and not isinstance(self._config.select, Reducer) and not at.observed and bool(later)
        if whole or not early or not eager or _needs_all(run, later):
            return held
        held.prepare(run.needed(later), run.layout.text + run.layout.generation[1])
        held.released = True
        for i, site in enumerate(sites):

            def fill(module: nn.Module, args: Any, kwargs: Kwargs, out: Any, i: int = i) -> None:
                layer = self.hooks.of_attention(kwargs)
                if layer is not None:
                    held.take(i, layer)

            assert site.module is not None
            hook = InstanceHook(site.module, fill)
            call.contexts.callback(site.module.register_forward_hook(hook, with_kwargs=True).remove)
        return held

    def resume(self, call: GenerationCall) -> tuple[Kwargs, Any]:
        """The arguments of a call that stores as those of one that reads the K/V of an earlier run, and their cache."""
        given, run = self.reuse.given, call.run
        assert given is not None
        cache = self.hooks.make(call.module, self.reuse.layers(call.kwargs[self._adapter.tokens].shape[0]))
        limit = (len(given.tokens),) if run.budgeting.shared or len(run.layout.references) == 1 else given.counts()
        tokens = None if given.complete else given.tokens
        self._held[cache] = HeldRows(run, len(given.layers), tokens, limit, foreign=not given.complete)
        return self.hooks.resumed(call.kwargs, run.layout, cache), cache

    def take_charge(self, call: GenerationCall, held: HeldRows, output: Any) -> None:
        """After a call that stores: follow its cache."""
        cache = self.hooks.of_output(output)
        if cache is not None:
            self._held[cache] = held
            self._account(call, held, cache)
            layers = [layer.get() for layer in self.hooks.layers(cache)]
            self.reuse.keep(layers, held.tokens, call.run.record, call.run.references.tokens)

    # -- the calls that read it ----------------------------------------------------------------

    def read(self, call: GenerationCall, kwargs: Kwargs) -> Kwargs:
        """Arguments of a cached call that attends to the tokens of its plan alone; listens where it measures.

        Raises
        ------
        LayoutError
            If the call brings a cache that this run did not fill.
        BudgetError
            If the plan keeps tokens that are not held.
        """
        run, plan, module = call.run, call.plan, call.module
        cache = self.hooks.of_call(kwargs)
        held = self._held.get(cache)
        if held is None or not held.are_of(run):
            raise LayoutError(
                "a cached call must bring the reference keys and values that this run's first step stored, got others: "
                "the tokens kept were chosen for this run's references"
            )
        if plan.reduced is not None:
            return kwargs
        sites = self._adapter.sites(module)
        routable = all(dispatches(site.processor) for site in sites)
        untouched = held.ranked is None and held.tokens is None
        measures_all = plan.kind == "profile" and plan.selection is None and routable and untouched
        if measures_all or (plan.kind == "dense" and not held.released):
            held.check(run.budgeting.full)
            self._account(call, held, cache)
            if measures_all and call.measures:
                call.contexts.enter_context(eager_blocks(module))
                call.contexts.enter_context(routed_attention(sites, self._heard(call, self._text(kwargs))))
            return kwargs
        self._arrange(call, held, cache, kwargs)
        self._account(call, held, cache)
        assert held.ranked is not None
        counts = run.budgeting.full if plan.selection is None else run.counts(call.at.step)
        reads = held.reads(counts)
        if run.config.layers is not None:
            call.step.layers = tuple(reads)
        if not routable or torch.is_grad_enabled() or (compiled_blocks(module) and not call.measures):
            views = [held.ranked.prefix(i, count) for i, count in enumerate(reads)]
            return self.hooks.reading(kwargs, self.hooks.make(module, views))
        if call.measures:
            call.contexts.enter_context(eager_blocks(module))
        text = self._text(kwargs)
        own = text + kwargs[self._adapter.tokens].shape[1]
        by_bank = [prefers_bank(site.processor, held.ranked, i, own, reads[i]) for i, site in enumerate(sites)]
        route = to_stored(call, held.ranked, reads, by_bank, text)
        call.contexts.enter_context(routed_attention(sites, route))
        return self.hooks.alone(kwargs)

    def _heard(self, call: GenerationCall, text: int) -> Route:
        """The model's own cached attention, text | references | generation, listened to."""
        layout = call.run.layout
        span = (text, text + layout.reference_tokens)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            every = torch.arange(span[1] - span[0], device=k.device)
            measured = call.run.profile.measures(call.at.step, i)
            out, lse = attention_with_lse(own, q, k, mask) if measured else (own(), None)
            lse = None if lse is None else lse[..., text:]
            view = AttentionView(k, v, q[:, text:], None, (span,), order=every, sizes=layout.sizes, lse=lse)
            call.run.observe(call.at.step, i, view)
            return out

        return attend

    def _arrange(self, call: GenerationCall, held: HeldRows, cache: Any, kwargs: Kwargs) -> None:
        run, at = call.run, call.at
        steps = [at.step] if at.observed else range(at.step, at.total)
        needs = run.needed(steps)
        if at.observed or self._config.cache_rows == "all":
            needs.append(held.limit)
        room = self._text(kwargs) + kwargs[self._adapter.tokens].shape[1]
        held.arrange(self.hooks.layers(cache), needs, room, at.observed or not _needs_all(run, steps))

    def _account(self, call: GenerationCall, held: HeldRows, cache: Any) -> None:
        """Write down the bytes that are held."""
        own = [layer.get()[0] for layer in self.hooks.layers(cache)]
        row = own[0][:, :1].numel() * own[0].element_size()
        call.run.record.dense_cache_bytes = 2 * len(own) * row * call.run.layout.reference_tokens
        held.bytes = 0
        if not held.released:
            held.bytes = sum(2 * (k if k.stride(0) else k[:1]).numel() * k.element_size() for k in own)
        if held.ranked is not None:
            held.bytes += held.ranked.row_bytes + held.ranked.room_bytes
        call.step.cache_bytes = sum(each.bytes for each in self._held.values() if each.are_of(call.run))

    def _text(self, kwargs: Kwargs) -> int:
        given = None if self._adapter.text_tokens is None else kwargs.get(self._adapter.text_tokens)
        return 0 if given is None else given.shape[1]


def _needs_all(run: Run, steps: Sequence[int]) -> bool:
    """Whether one of `steps` runs on the model's own cache, bit for bit as without a patch."""
    everything = run.layout.reference_tokens
    return not run.ranking.known or any(sum(run.counts(step)) >= everything for step in steps)
