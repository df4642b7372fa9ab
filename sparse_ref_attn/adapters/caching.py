"""A model's own cache of reference K/V, put in rank order and read by prefix while a patched run goes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SparseRef
from ..errors import ConfigError, IncompatibleError, LayoutError
from ..ops.with_lse import attention_with_lse
from ..profiling import AttentionView
from ..record import StepRecord
from ..reference_cache import RankedCache
from ..selection import Reducer
from ..session import Plan, Session
from ..types import TokenLayout
from . import seams
from .base import Adapter, Kwargs
from .hooks import InstanceHook
from .kept import KeptCache
from .proving import attend_to_bank, prefers_bank
from .reuse import CacheReuse
from .steps import RunStep

__all__ = ["CacheKeeper", "CachedCall", "check_cache"]


def check_cache(config: SparseRef, adapter: Adapter, attention_layers: int, keeps: bool) -> None:
    """Raise where the configuration asks for a cache that the model does not keep, or for other layers than it has."""
    if config.execute in ("cache", "both") and not keeps:
        raise IncompatibleError(
            f'execute="{config.execute}" needs a model that computes its references\' keys and values once and '
            f"keeps them (FLUX.2 Klein-KV), got {adapter.name} without such a cache: its reference tokens look at "
            'the image being made, so theirs change at every step. Use execute="tokens"'
        )
    if config.layers is not None and len(config.layers) != attention_layers:
        raise ConfigError(
            f"layers must be a factor for each of the {attention_layers} attention layers, got {len(config.layers)}"
        )


class CachedCall:
    """What must be known after a call that fills a cache, or stands in for one that does."""

    def __init__(self, kept: KeptCache, resumed: Any = None) -> None:
        self.kept, self.resumed = kept, resumed


class CacheKeeper:
    """Follows the caches of one patched transformer; a cache is forgotten with the model's own object.

    Parameters
    ----------
    adapter : Adapter
        Of a family with a `CacheSeam`.
    session : Session
    """

    def __init__(self, adapter: Adapter, session: Session) -> None:
        assert adapter.cache is not None
        self._adapter, self._session, self._config = adapter, session, session.config
        self._seam = adapter.cache
        self._kept: weakref.WeakKeyDictionary[Any, KeptCache] = weakref.WeakKeyDictionary()
        self.reuse = CacheReuse(adapter, session.config)

    # -- the call that fills a cache -----------------------------------------------------------

    def filling(
        self, contexts: contextlib.ExitStack, module: nn.Module, kwargs: Kwargs, dropped: Plan | None, run: RunStep
    ) -> CachedCall:
        """Before an extract call, whose rows are `dropped`'s if it is given.

        Where the ranking is known and no later step needs all rows, each layer's rows go into rank
        order as soon as they are stored, so that the whole cache never exists.
        """
        sites, session, later = self._adapter.sites(module), self._session, range(run.step + 1, run.total)
        if seams.splits_the_sequence(module):
            raise IncompatibleError(
                "a model that keeps its references' keys and values cannot run under context parallelism: diffusers "
                "splits their rows over the ranks, and each rank's attention sees its own alone. Call "
                "disable_parallelism(), or use a pipeline without the cache"
            )
        if dropped is None or dropped.selection is None:
            kept = KeptCache(session, len(sites), None, session.everything)
        else:
            kept = KeptCache(session, len(sites), dropped.selection.indices, session.most([run.step, *later]))
        whole = self.reuse.wants(module, kwargs, self._layout, self._tokens)
        eager = not torch.is_grad_enabled() and not seams.compiled_blocks(module) and all(s.module for s in sites)
        early = session.ranked and not isinstance(self._config.select, Reducer) and not run.observed and bool(later)
        if whole or not early or not eager or self._needs_all(later):
            return CachedCall(kept)
        kept.prepare(session.upcoming(later), self._layout.text + self._layout.generation[1])
        kept.released = True
        for i, site in enumerate(sites):

            def fill(module: nn.Module, args: Any, kwargs: Kwargs, out: Any, i: int = i) -> None:
                layer = self._seam.of_attention(kwargs)
                if layer is not None:
                    kept.take(i, layer)

            assert site.module is not None
            hook = InstanceHook(site.module, fill)
            contexts.callback(site.module.register_forward_hook(hook, with_kwargs=True).remove)
        return CachedCall(kept)

    def resume(self, module: nn.Module, kwargs: Kwargs) -> tuple[Kwargs, CachedCall]:
        """An extract call's arguments as those of a cached call on the K/V of an earlier run."""
        held = self.reuse.given
        assert held is not None
        cache = self._seam.make(module, self.reuse.layers(kwargs[self._adapter.tokens].shape[0]))
        limit = (len(held.tokens),) if len(self._session.everything) == 1 else held.counts()
        tokens = None if held.complete else held.tokens
        kept = KeptCache(self._session, len(held.layers), tokens, limit, foreign=not held.complete)
        self._kept[cache] = kept
        return self._seam.resumed(kwargs, self._layout, cache), CachedCall(kept, cache)

    def after(self, call: CachedCall, output: Any, step: StepRecord) -> Any:
        """After an extract call, or one that stands in for it: take charge of its cache."""
        if call.resumed is not None:
            return self._seam.returned(output, call.resumed)
        cache = self._seam.of_output(output)
        if cache is not None:
            self._kept[cache] = call.kept
            self._account(call.kept, cache, step)
            assert self._session.record is not None
            self.reuse.filled(cache, call.kept.tokens, self._session.record, self._tokens)
        return output

    # -- the calls that read it ----------------------------------------------------------------

    def read(
        self,
        contexts: contextlib.ExitStack,
        module: nn.Module,
        kwargs: Kwargs,
        plan: Plan,
        run: RunStep,
        step: StepRecord,
    ) -> Kwargs:
        """Arguments of a cached call that attends to the tokens of `plan` alone; listens where it measures.

        Raises
        ------
        LayoutError
            If the call brings a cache that this run did not fill.
        BudgetError
            If the plan keeps tokens that are not held.
        """
        cache = self._seam.of_call(kwargs)
        kept = self._kept.get(cache)
        if kept is None:
            raise LayoutError(
                "a cached call must bring the reference keys and values that this run's first step stored, got others: "
                "the tokens kept were chosen for this run's references"
            )
        if plan.reduced is not None:
            return kwargs
        if plan.kind == "dense" and not kept.released:
            kept.check(self._session.everything)
            self._account(kept, cache, step)
            return kwargs
        sites = self._adapter.sites(module)
        routable = all(hasattr(site.processor, "_attention_backend") for site in sites)
        measures = plan.kind == "profile" and step.calls == 0
        untouched = kept.ranked is None and kept.tokens is None
        if plan.kind == "profile" and plan.selection is None and routable and untouched:
            kept.check(self._session.everything)
            self._account(kept, cache, step)
            if measures:
                contexts.enter_context(seams.eager_blocks(module))
                contexts.enter_context(seams.routed_attention(sites, self._heard(self._text(kwargs), run.step)))
            return kwargs
        self._arrange(kept, cache, kwargs, run)
        self._account(kept, cache, step)
        assert kept.ranked is not None
        counts = self._session.everything if plan.selection is None else self._session.counts(run.step)
        reads = [sum(kept.scaled(counts, i)) for i in range(len(sites))]
        if self._config.layers is not None:
            step.layers = tuple(reads)
        if not routable or torch.is_grad_enabled() or (seams.compiled_blocks(module) and not measures):
            views = [kept.ranked.prefix(i, count) for i, count in enumerate(reads)]
            return self._seam.reading(kwargs, self._seam.make(module, views))
        if measures:
            contexts.enter_context(seams.eager_blocks(module))
        own = self._text(kwargs) + kwargs[self._adapter.tokens].shape[1]
        by_bank = [prefers_bank(site.processor, kept.ranked, i, own, reads[i]) for i, site in enumerate(sites)]
        route = self._route(kept.ranked, reads, by_bank, self._text(kwargs), run.step if measures else None)
        contexts.enter_context(seams.routed_attention(sites, route))
        return self._seam.alone(kwargs)

    def _heard(self, text: int, measured: int) -> seams.Route:
        """The model's own cached attention, text | references | generation, listened to."""
        span = (text, text + self._layout.reference_tokens)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: seams.Attention) -> Tensor:
            every = torch.arange(span[1] - span[0], device=k.device)
            out, lse = (
                attention_with_lse(own, q, k, mask) if self._session.profile.measures(measured, i) else (own(), None)
            )
            lse = None if lse is None else lse[..., text:]
            view = AttentionView(k, v, q[:, text:], None, (span,), order=every, sizes=self._layout.sizes, lse=lse)
            self._session.observe(measured, i, view)
            return out

        return attend

    def _route(
        self, ranked: RankedCache, reads: Sequence[int], by_bank: Sequence[bool], text: int, measured: int | None
    ) -> seams.Route:
        sizes = self._layout.sizes

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: seams.Attention) -> Tensor:
            if by_bank[i] and mask is None and measured is None:
                return attend_to_bank(ranked, i, reads[i], q, k, v)
            keys, values = ranked.join(i, k, v, reads[i])
            if measured is not None:
                stored, vectors, span, order = ranked.all_of(i, k.shape[1])
                view = AttentionView(stored, vectors, q[:, text:], None, (span,), order=order, sizes=sizes)
                self._session.observe(measured, i, view)
            return own(keys, values)

        return attend

    def _arrange(self, kept: KeptCache, cache: Any, kwargs: Kwargs, run: RunStep) -> None:
        steps = [run.step] if run.observed else range(run.step, run.total)
        needs = self._session.upcoming(steps)
        if run.observed or self._config.cache_rows == "all":
            needs.append(kept.limit)
        room = self._text(kwargs) + kwargs[self._adapter.tokens].shape[1]
        release = run.observed or not self._needs_all(steps)
        kept.arrange(self._seam.layers(cache), needs, room, release)

    def _needs_all(self, steps: Sequence[int]) -> bool:
        """Whether one of `steps` runs on the model's own cache, bit for bit as without a patch."""
        session, everything = self._session, sum(self._layout.sizes)
        return not session.ranked or any(sum(session.counts(step)) >= everything for step in steps)

    def _account(self, kept: KeptCache, cache: Any, step: StepRecord) -> None:
        """Write down the bytes that are held."""
        record = self._session.record
        assert record is not None
        own = [layer.get()[0] for layer in self._seam.layers(cache)]
        row = own[0][:, :1].numel() * own[0].element_size()
        record.dense_cache_bytes = 2 * len(own) * row * record.layout.reference_tokens
        kept.bytes = 0
        if not kept.released:
            kept.bytes = sum(2 * (k if k.stride(0) else k[:1]).numel() * k.element_size() for k in own)
        if kept.ranked is not None:
            kept.bytes += kept.ranked.row_bytes + kept.ranked.room_bytes
        step.cache_bytes = sum(each.bytes for each in self._kept.values())

    @property
    def _layout(self) -> TokenLayout:
        assert self._session.record is not None
        return self._session.record.layout

    @property
    def _tokens(self) -> Tensor:
        assert self._session.references is not None
        return self._session.references.tokens

    def _text(self, kwargs: Kwargs) -> int:
        given = None if self._adapter.text_tokens is None else kwargs.get(self._adapter.text_tokens)
        return 0 if given is None else given.shape[1]
