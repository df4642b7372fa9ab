"""A model's own cache of reference K/V, put in rank order and read by prefix while a patched run goes."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SparseRef
from ..errors import BudgetError, ConfigError, IncompatibleError, LayoutError
from ..profiling import AttentionView
from ..record import StepRecord
from ..reference_cache import RankedCache
from ..selection import Reducer
from ..session import Plan, Session
from ..types import TokenLayout
from . import seams
from .base import Adapter, Kwargs
from .cache_seam import CacheSeam
from .hooks import InstanceHook
from .steps import RunStep

__all__ = ["CacheKeeper"]

Counts = tuple[int, ...]


class _Kept:
    """One cache object of the model, and its rows in rank order.

    Attributes
    ----------
    tokens : Tensor, shape (K,), int64, optional
        Reference tokens that the model's own cache holds, ascending; None for all.
    limit : tuple of int
        Their counts.
    sparse : bool
        Whether `tokens` are an earlier run's choice, so that it must be seen that this run's are among them.
    ranked : RankedCache, optional
        Made when a step first leaves tokens out.
    orders : dict
        Tokens in the order of the ranked rows, for each factor of `SparseRef.layers`.
    most, nested : tuple of int, tuple of (tuple of int)
        Counts that the ranked rows hold, and counts whose choice is a prefix of them.
    version : object
        Of the ranking they are ordered by.
    released : bool
        Whether the model's own cache gave its rows up, and holds views of the ranked ones.
    """

    def __init__(self, tokens: Tensor | None, limit: Counts, sparse: bool = False) -> None:
        self.tokens, self.limit, self.sparse = tokens, limit, sparse
        self.ranked: RankedCache | None = None
        self.orders: dict[float, Tensor] = {}
        self.most: Counts = ()
        self.nested: tuple[Counts, ...] = ()
        self.version: object = None
        self.released = False
        self.bytes = 0


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
        self._seam: CacheSeam = adapter.cache
        self._kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()

    @staticmethod
    def check(adapter: Adapter, transformer: nn.Module, config: SparseRef) -> None:
        """Raise where the configuration asks for a cache that the model does not keep."""
        keeps = adapter.cache is not None and adapter.cache.kept_by(transformer)
        if config.execute in ("cache", "both") and not keeps:
            raise IncompatibleError(
                f'execute="{config.execute}" needs a model that computes its references\' keys and values once and '
                f"keeps them (FLUX.2 Klein-KV), got {adapter.name} without such a cache: its reference tokens look at "
                'the image being made, so theirs change at every step. Use execute="tokens"'
            )
        sites = adapter.sites(transformer)
        if config.layers is not None and len(config.layers) != len(sites):
            raise ConfigError(
                f"layers must be a factor for each of the {len(sites)} attention layers, got {len(config.layers)}"
            )

    # -- the call that fills a cache -----------------------------------------------------------

    def filling(self, contexts: contextlib.ExitStack, module: nn.Module, run: RunStep, dropped: Plan | None) -> _Kept:
        """Before an extract call, whose rows are `dropped`'s if it is given: what will stand beside its cache.

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
            kept = _Kept(None, session.everything)
        else:
            kept = _Kept(dropped.selection.indices, session.most([run.step, *later]))
        eager = not torch.is_grad_enabled() and not seams.compiled_blocks(module)
        early = session.ranked and not isinstance(self._config.select, Reducer) and not run.observed and bool(later)
        if not early or not eager or self._needs_all(later) or any(site.module is None for site in sites):
            return kept
        layout = self._layout
        self._order(kept, self._session.upcoming(later), len(sites))
        kept.ranked = RankedCache(self._rows(kept, len(sites)), layout.text + layout.generation[1])
        kept.released = True
        for i, site in enumerate(sites):
            assert site.module is not None

            def fill(module: nn.Module, args: Any, kwargs: Kwargs, out: Any, i: int = i) -> None:
                layer = self._seam.of_attention(kwargs)
                if layer is not None:
                    self._move(kept, i, layer)

            hook = InstanceHook(site.module, fill)
            contexts.callback(site.module.register_forward_hook(hook, with_kwargs=True).remove)
        return kept

    def follow(self, output: Any, kept: _Kept, step: StepRecord) -> None:
        """After an extract call: take charge of the cache that it filled."""
        cache = self._seam.of_output(output)
        if cache is not None:
            self._kept[cache] = kept
            self._account(kept, cache, step)

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
            self._within(kept, self._session.everything)
            self._account(kept, cache, step)
            return kwargs
        self._arrange(kept, cache, kwargs, run)
        self._account(kept, cache, step)
        sites = self._adapter.sites(module)
        counts = self._session.everything if plan.selection is None else self._session.counts(run.step)
        reads = [sum(self._scaled(counts, i)) for i in range(len(sites))]
        if self._config.layers is not None:
            step.layers = tuple(reads)
        measures = plan.kind == "profile" and step.calls == 0
        routable = all(hasattr(site.processor, "_attention_backend") for site in sites)
        assert kept.ranked is not None
        if not routable or torch.is_grad_enabled() or (seams.compiled_blocks(module) and not measures):
            views = [kept.ranked.prefix(i, count) for i, count in enumerate(reads)]
            return self._seam.reading(kwargs, self._seam.make(module, views))
        if measures:
            contexts.enter_context(seams.eager_blocks(module))
        route = self._route(kept.ranked, reads, self._text(kwargs), run.step if measures else None)
        contexts.enter_context(seams.routed_attention(sites, route))
        return self._seam.alone(kwargs)

    def _route(self, ranked: RankedCache, reads: Sequence[int], text: int, measured: int | None) -> seams.Route:
        sizes = self._layout.sizes

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: seams.Attention) -> Tensor:
            keys, values = ranked.join(i, k, v, reads[i])
            if measured is not None:
                stored, vectors, span, order = ranked.all_of(i, k.shape[1])
                view = AttentionView(stored, vectors, q[:, text:], None, (span,), order=order, sizes=sizes)
                self._session.observe(measured, i, view)
            return own(keys, values)

        return attend

    # -- which rows, in which order --------------------------------------------------------------

    def _arrange(self, kept: _Kept, cache: Any, kwargs: Kwargs, run: RunStep) -> None:
        """See that the rows of this step and of those to come are held, and that this step's are a prefix."""
        session, layers = self._session, self._seam.layers(cache)
        steps = [run.step] if run.observed else range(run.step, run.total)
        needs = self._session.upcoming(steps)
        if run.observed or self._config.cache_rows == "all":
            needs.append(kept.limit)
        now, most = needs[0], _most(needs)
        self._within(kept, most)
        room = self._text(kwargs) + kwargs[self._adapter.tokens].shape[1]
        if kept.ranked is None:
            self._order(kept, needs, len(layers))
            kept.ranked = RankedCache(self._rows(kept, len(layers)), room)
            kept.released = run.observed or not self._needs_all(steps)
            for i, layer in enumerate(layers):
                self._move(kept, i, layer)
        moved = kept.ranked.reserve(room)
        shrinks = 4 * sum(most) <= 3 * sum(kept.most)
        if kept.version != session.version or now not in kept.nested or (shrinks and most not in kept.nested):
            self._order(kept, [*needs, most, kept.most], len(layers))
            if now not in kept.nested:
                self._order(kept, [now, most, kept.most], len(layers))
            for i in range(len(layers)):
                kept.ranked.rearrange(i, self._positions(kept, i))
        if shrinks:
            kept.most = most
            kept.ranked.shrink(self._rows(kept, len(layers)))
            moved = True
        released = kept.released or not self._needs_all(steps)
        if released and (moved or not kept.released):
            for i, layer in enumerate(layers):
                layer.store(*kept.ranked.prefix(i, kept.ranked.rows[i]))
        kept.released = released

    def _needs_all(self, steps: Sequence[int]) -> bool:
        """Whether one of `steps` runs on the model's own cache, bit for bit as without a patch."""
        session = self._session
        return not session.ranked or any(sum(session.counts(step)) >= sum(self._layout.sizes) for step in steps)

    def _order(self, kept: _Kept, needs: Sequence[Counts], layers: int) -> None:
        """Put tokens in an order of which each of `needs`, as far as they are nested, is a prefix."""
        nested = set(needs) | {_most(needs)}
        kept.orders = {}
        for i in range(layers):
            factor = self._factor(i)
            if factor in kept.orders:
                continue
            scaled = {counts: self._scaled(counts, i) for counts in nested}
            kept.orders[factor], prefixes = self._session.rank_order(list(scaled.values()))
            nested = {counts for counts in nested if scaled[counts] in prefixes}
        kept.most, kept.nested, kept.version = _most(needs), tuple(nested), self._session.version

    def _rows(self, kept: _Kept, layers: int) -> list[int]:
        return [sum(self._scaled(kept.most, i)) for i in range(layers)]

    def _move(self, kept: _Kept, i: int, layer: Any) -> None:
        """Put a layer's rows into rank order; where they are not needed as they were, hand back views."""
        assert kept.ranked is not None
        k, v = layer.get()
        kept.ranked.store(i, k, v, self._positions(kept, i))
        if kept.released:
            layer.store(*kept.ranked.prefix(i, kept.ranked.rows[i]))

    def _positions(self, kept: _Kept, i: int) -> Tensor:
        """Rows of the model's own cache that hold the ordered tokens."""
        order = kept.orders[self._factor(i)]
        if kept.tokens is None:
            return order
        if kept.sparse and not bool(torch.isin(order, kept.tokens).all()):
            raise BudgetError(
                f"the reused reference cache holds {len(kept.tokens)} of {sum(self._layout.sizes)} tokens, and this "
                'budget keeps others: keep fewer tokens, or save the cache of a run with cache_rows="all"'
            )
        return torch.searchsorted(kept.tokens, order)

    def _within(self, kept: _Kept, counts: Counts) -> None:
        if any(count > held for count, held in zip(counts, kept.limit, strict=True)):
            raise BudgetError(
                f"a step must keep tokens whose keys and values are held, {kept.limit} of {self._layout.sizes}, "
                f"got a budget of {counts}"
            )

    def _factor(self, i: int) -> float:
        return 1.0 if self._config.layers is None else self._config.layers[i]

    def _scaled(self, counts: Counts, i: int) -> Counts:
        return tuple(math.ceil(self._factor(i) * count) for count in counts)

    def _account(self, kept: _Kept, cache: Any, step: StepRecord) -> None:
        """Write down the bytes that are held."""
        record = self._session.record
        assert record is not None
        layers = self._seam.layers(cache)
        own = [layer.get()[0] for layer in layers]
        row = own[0][:, :1].numel() * own[0].element_size()
        record.dense_cache_bytes = 2 * len(own) * row * record.layout.reference_tokens
        kept.bytes = 0 if kept.released else sum(2 * k.numel() * k.element_size() for k in own)
        if kept.ranked is not None:
            kept.bytes += kept.ranked.row_bytes + kept.ranked.room_bytes
        step.cache_bytes = sum(each.bytes for each in self._kept.values())

    @property
    def _layout(self) -> TokenLayout:
        record = self._session.record
        assert record is not None
        return record.layout

    def _text(self, kwargs: Kwargs) -> int:
        given = None if self._adapter.text_tokens is None else kwargs.get(self._adapter.text_tokens)
        return 0 if given is None else given.shape[1]


def _most(counts: Sequence[Counts]) -> Counts:
    """The counts that hold each of `counts`."""
    return tuple(max(each) for each in zip(*counts, strict=True))
