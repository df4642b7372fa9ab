"""Work of measuring attention in a planned run."""

from __future__ import annotations

from ..cost import Flops, ModelShape, scoring_flops
from ..types import TokenLayout
from .planned import PlannedRun

__all__ = ["scoring_of"]


def scoring_of(
    shape: ModelShape, run: PlannedRun, layout: TokenLayout, batch: int, calls: int, lse_given: bool
) -> Flops:
    """Work of measuring attention: probes that share queries and stride are measured once a block, in a step's first
    call; for tiles every layer is, in each of its `calls`.

    `lse_given`: the model's own attention gives its LSE. That of a step on stored keys is of other keys.
    """
    probing, line = run.probing, run.line
    measured = {
        (step, block, probe.queries, probe.query_stride)
        for probe in probing.probes
        for step in (*probe.steps, *(step for step in range(len(run.kinds)) if line.reranks(step)))
        for block in probing.where[probe]
        if step not in run.ranked
    }
    keys, total = layout.text + layout.rows, Flops(0, 0)
    for step, _, queries, stride in measured:
        stored = line.reads and line.reranks(step)
        parts = [(size, size) for size in layout.sizes]
        if queries == "generation":
            parts = [(layout.generation[1], layout.reference_tokens)]
        for rows, own in parts:
            read = own if lse_given and not stored else keys
            total = total + scoring_flops(shape, -(-rows // stride), read, 1, batch)
    own = layout.reference_tokens if lse_given else keys
    tiles = scoring_flops(shape, layout.generation[1], own, shape.attention_layers, batch * calls)
    return total + tiles * len(run.ranked)
