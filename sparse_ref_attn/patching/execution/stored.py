"""Attention of a call's own rows to its own keys and to stored ones, which lie beside them in rank order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...adapters import masks
from ...adapters.mask_columns import beside
from ...hooks.diffusers import Attention, Route, of_heads
from ...reference_cache import RankedCache
from ...run import AttentionView
from ..call import GenerationCall
from ..proving import attend_to_bank

__all__ = ["joined", "to_stored"]


def to_stored(
    call: GenerationCall,
    ranked: RankedCache,
    reads: Sequence[int],
    by_bank: Sequence[bool],
    columns: Tensor | None = None,
) -> Route:
    """Attention in which layer i reads the best ``reads[i]`` rows; where the call measures, it is that to every row.

    Parameters
    ----------
    call : GenerationCall
    ranked : RankedCache
    reads : sequence of int
    by_bank : sequence of bool
        Whether a layer's rows are read where they lie, by a kernel that gathers.
    columns : Tensor, shape (B or 1, H or 1, N or 1, R), optional
        The caller's mask of the reference tokens, in order.
    """

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
        rows = k.shape[1]
        if by_bank[i] and mask is None and columns is None and not call.measures:
            return attend_to_bank(ranked, i, reads[i], q, k, v)
        if call.measures:
            ranked.join(i, k.detach(), v.detach(), reads[i])
            stored, vectors, span, order = ranked.all_of(i, rows)
            masked = _masked(mask, columns, ranked, i, ranked.rows[i], q, rows)
            call.run.observe(call.at.step, i, _view(call, q.detach(), stored, vectors, span, order, masked))
        masked = _masked(mask, columns, ranked, i, reads[i], q, rows)
        if torch.is_grad_enabled():  # the room is not a part of any graph
            return own(*joined(ranked.prefix(i, reads[i]), (k, v), ranked.before(i)), masked)
        return own(*ranked.join(i, k, v, reads[i]), masked)

    return attend


def joined(stored: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], before: bool) -> tuple[Tensor, Tensor]:
    """A call's own keys and values (B, S, H, C) with stored ones beside them, before or behind; differentiable."""
    (k, v), (own_k, own_v) = stored, own
    if before:
        return torch.cat([k, own_k], 1), torch.cat([v, own_v], 1)
    return torch.cat([own_k, k], 1), torch.cat([own_v, v], 1)


def _view(
    call: GenerationCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: tuple[int, int],
    order: Tensor,
    mask: Tensor | None,
) -> AttentionView:
    """The generation's queries, the last ones, over own and stored keys, of the items that are scored."""
    items, heads, rows = call.layout.conditional or slice(None), q.shape[2], call.run.layout.generation[1]
    seen: dict[str, Any] = {}
    if mask is not None and mask.shape[2] > 1:
        mask = mask if mask.shape[0] == 1 else mask[items]
        seen = {"masks": {"generation": mask[:, :, -rows:]}}
    elif mask is not None:
        seen = masks.viewed(mask, q.shape[0], k.shape[1], {"generation": slice(None)}, items)
    k, v = (of_heads(x[items], heads) for x in (k, v))
    sizes = call.run.layout.sizes
    return AttentionView(k, v, q[items, -rows:], None, (span,), order=order, sizes=sizes, **seen)


def _masked(
    mask: Tensor | None, columns: Tensor | None, ranked: RankedCache, layer: int, count: int, q: Tensor, own: int
) -> Tensor | None:
    """The mask of a layer's `own` keys and its best `count` stored ones; None where all may be attended to."""
    if columns is not None:
        columns = columns.index_select(3, ranked.tokens(layer, count).to(columns.device))
    return beside(mask, columns, count, own, q.shape[0], ranked.before(layer))
