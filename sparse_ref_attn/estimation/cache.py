"""What a run on a cache of reference K/V does in each step, for `estimate`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config import SparseRef
from ..cost import Flops, ModelShape, StepTokens, layered_flops, run_flops
from ..types import TokenLayout

__all__ = ["run_work", "with_cache"]


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
