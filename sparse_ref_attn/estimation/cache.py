"""What a run on a cache of reference K/V does in each step, for `estimate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from torch import nn

from ..adapters import Adapter
from ..config import SparseRef
from ..cost import Flops, ModelShape, StepTokens, layered_flops, run_flops
from ..types import TokenLayout

__all__ = ["kept_whole", "run_work", "with_cache"]


def kept_whole(adapter: Adapter, transformer: nn.Module, layout: TokenLayout) -> tuple[bool, bool, TokenLayout]:
    """Whether the model fills its own cache before the steps; whether with all tokens; and the layout as it has it."""
    hooks = adapter.cache
    if hooks is None or not hooks.whole or not hooks.kept_by(transformer):
        return False, False, layout
    places = tuple(accumulate(layout.sizes, initial=0))[:-1] if hooks.text else ()
    return hooks.before_steps, True, replace(layout, places=places)


def with_cache(
    config: SparseRef, layout: TokenLayout, kinds: Sequence[str], kept: Sequence[int], means: int = 0
) -> tuple[list[str], list[int], list[StepTokens]]:
    """The steps of a run that drops tokens (`kinds`, `kept`), as a model that keeps its references' K/V makes them.

    The first computes the K/V, of every token unless the ranking is known before it and ``execute="both"``; the
    others read those that they keep, and `means` of cells beside a part of them.
    """
    total, text, generation = layout.reference_tokens, layout.text, layout.generation[1]
    first = max(kept) if kinds[0] == "sparse" and config.execute.name == "both" else total
    start = kinds[0] if kinds[0] == "profile" else "sparse" if first < total else "dense"
    tokens = [StepTokens(text, generation, first, split=True)]
    tokens += [StepTokens(text, generation, 0, cached=n + (means if n < total else 0)) for n in kept[1:]]
    return [start, *("cached" for _ in kept[1:])], [first, *kept[1:]], tokens


def run_work(
    config: SparseRef, shape: ModelShape, tokens: Sequence[StepTokens], batch: int, calls: int, scoring: Flops
) -> Flops:
    """As `run_flops`, with each layer's own number of stored tokens."""
    if config.layers is None:
        return run_flops(shape, tokens, batch, calls, scoring)
    total = run_flops(shape, [t for t in tokens if not t.cached], batch, calls, scoring)
    for step in tokens:
        if step.cached:
            reads = [math.ceil(factor * step.cached) for factor in config.layers]
            total = total + layered_flops(shape, step, reads, batch * calls)
    return total
