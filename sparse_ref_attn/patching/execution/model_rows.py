"""Reference K/V that a model itself keeps between steps, put in rank order and read by prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import Kwargs
from ...adapters.masks import viewed
from ...hooks.compiled import compiled_blocks, eager_blocks
from ...hooks.diffusers import Attention, Route, answerable, routed_attention
from ...hooks.instance import InstanceHook
from ...ops.with_lse import attention_with_lse
from ...run import AttentionView, Run, covering
from ...selection import Reducer
from ..call import GenerationCall
from ..proving import prefers_bank
from .held_rows import HeldRows
from .model_cache import CacheKeeper
from .stored import to_stored

__all__ = ["RankedKeeper"]


class RankedKeeper(CacheKeeper[HeldRows]):
    """A `CacheKeeper` whose rows are read in the order of the run's ranking."""

    def _empty(self, call: GenerationCall, whole: bool) -> HeldRows:
        """Where the ranking is known and no later step needs all rows, each layer's rows go into rank order as soon as
        they are stored, so that the whole cache never exists."""
        run, at, dropped = call.run, call.at, call.plan.selection if call.plan.kind == "sparse" else None
        sites, later = self._adapter.sites(call.module), range(at.step + 1, at.total)
        if dropped is None:
            held = HeldRows(run, len(sites), None, run.budgeting.full)
        else:
            held = HeldRows(run, len(sites), dropped.indices, covering(run.needed([at.step, *later])))
        eager = not torch.is_grad_enabled() and not compiled_blocks(call.module) and all(s.module for s in sites)
        early = (
            not self.hooks.whole
            and run.ranking.known
            and not isinstance(self._config.select, Reducer)
            and not at.observed
            and bool(later)
        )
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

    def _resumed(self, call: GenerationCall, cache: Any) -> HeldRows:
        given, run = self.reuse.given, call.run
        assert given is not None
        limit = (len(given.tokens),) if run.budgeting.shared or len(run.layout.references) == 1 else given.counts()
        tokens = None if given.complete else given.tokens
        return HeldRows(run, len(given.layers), tokens, limit, foreign=not given.complete)

    def _found(self, call: GenerationCall, cache: Any) -> HeldRows:
        return HeldRows(call.run, len(self.hooks.layers(cache)), None, call.run.budgeting.full)

    # -- the calls that read it ----------------------------------------------------------------

    def _read(self, call: GenerationCall, kwargs: Kwargs, held: HeldRows, cache: Any) -> Kwargs:
        run, plan, module = call.run, call.plan, call.module
        if plan.reduced is not None:
            return kwargs
        sites = self._adapter.sites(module)
        routable = answerable(sites)
        untouched = held.ranked is None and held.tokens is None
        measures_all = plan.kind == "profile" and plan.selection is None and routable and untouched
        if measures_all or (plan.kind == "dense" and not held.released):
            held.check(run.budgeting.full)
            self._account(call, held, cache)
            if measures_all and call.measures:
                call.contexts.enter_context(eager_blocks(module))
                call.contexts.enter_context(routed_attention(sites, self._heard(call)))
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
        own = self._own(call, kwargs)
        by_bank = [prefers_bank(site.processor, held.ranked, i, own, reads[i]) for i, site in enumerate(sites)]
        route = to_stored(call, held.ranked, reads, by_bank)
        call.contexts.enter_context(routed_attention(sites, route))
        return self.hooks.alone(kwargs)

    def _heard(self, call: GenerationCall) -> Route:
        """The model's own cached attention, listened to."""
        rows, spans = call.run.layout.generation[1], self.hooks.spans(call.run.layout)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            measured = call.run.profile.measures(call.at.step, i)
            out, lse = attention_with_lse(own, q, k, mask) if measured else (own(), None)
            lse = None if lse is None else lse[..., -rows:]
            seen = viewed(mask, q.shape[0], k.shape[1], {"generation": slice(-rows, None)}, slice(None))
            call.run.observe(call.at.step, i, AttentionView(k, v, q[:, -rows:], None, spans, lse=lse, **seen))
            return out

        return attend

    def _own(self, call: GenerationCall, kwargs: Kwargs) -> int:
        """Rows of a cached call's own keys, and of the text's where these are kept beside the references'."""
        return self._adapter.text_rows(kwargs) + call.run.layout.generation[1]

    def _arrange(self, call: GenerationCall, held: HeldRows, cache: Any, kwargs: Kwargs) -> None:
        run, at = call.run, call.at
        steps = [at.step] if at.observed else range(at.step, at.total)
        needs = run.needed(steps)
        if at.observed or self._config.cache_rows == "all":
            needs.append(held.limit)
        room = self._own(call, kwargs)
        held.arrange(self.hooks.layers(cache), needs, room, at.observed or not _needs_all(run, steps))

    def _bytes(self, held: HeldRows, cache: Any) -> int:
        total = 0
        if not held.released:
            own = [layer.get()[0] for layer in self.hooks.layers(cache)]
            total = sum(2 * (k if k.stride(0) else k[:1]).numel() * k.element_size() for k in own)
        return total if held.ranked is None else total + held.ranked.row_bytes + held.ranked.room_bytes


def _needs_all(run: Run, steps: Sequence[int]) -> bool:
    """Whether one of `steps` runs on the model's own cache, bit for bit as without a patch."""
    everything = run.layout.reference_tokens
    return not run.ranking.known or any(sum(run.counts(step)) >= everything for step in steps)
