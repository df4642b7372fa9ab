"""Stored references in the order of one ranking: a cached call reads the best of them, beside its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...adapters.base import Adapter, Kwargs
from ...adapters.mask_columns import reference_columns
from ...config import SparseRef
from ...cost import ModelShape, reference_kv_bytes, room_bytes
from ...hooks.diffusers import Attention, Route, chosen_backend
from ...reference_cache import RankedCache
from ...run import Run, covering
from ...types import TokenLayout
from ..call import GenerationCall
from ..proving import prefers_bank
from ..steps import RunStep
from .held_rows import HeldRows
from .joint import JointAttention
from .stored import to_stored

__all__ = ["ByRank", "LayerRows", "held_keys", "reference_keys"]


@dataclass(frozen=True)
class LayerRows:
    """A layer's keys and values of every reference token, in order."""

    k: Tensor
    v: Tensor

    def get(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def store(self, k: Tensor, v: Tensor) -> None:
        """They are the call's own, and stay as they are."""


class ByRank:
    """How `HeldRows` are filled by full calls and read by cached ones.

    Parameters
    ----------
    adapter : Adapter
    config : SparseRef
    """

    measures = False

    def __init__(self, adapter: Adapter, config: SparseRef) -> None:
        self._adapter, self._config = adapter, config

    def check(self, module: nn.Module, layout: TokenLayout, kwargs: Kwargs) -> None:
        """Any references can be stored."""

    def room(self, shape: ModelShape, run: Run, at: RunStep, kwargs: Kwargs) -> tuple[int, int]:
        layout, batch = run.layout, kwargs[self._adapter.tokens].shape[0]
        kept = sum(covering(run.needed(range(at.total)))) if run.ranking.known else layout.reference_tokens
        rows = layout.reference_tokens if self._config.cache_rows == "all" else kept
        own = layout.text + layout.generation[1]
        return rows, reference_kv_bytes(shape, rows, batch) + room_bytes(shape, own, batch)

    def empty(self, call: GenerationCall, attention: JointAttention) -> HeldRows:
        run, selection = call.run, call.plan.selection
        needs = run.needed(range(call.at.step, call.at.total))
        limit = run.budgeting.full if selection is None else covering(needs)
        tokens = None if selection is None else selection.indices
        held = HeldRows(run, len(attention.layers), tokens, limit)
        if self._config.cache_rows == "all":
            needs.append(limit)
        held.prepare(needs, call.layout.text + call.layout.generation[1])
        return held

    def storing(self, call: GenerationCall, held: HeldRows, attention: JointAttention) -> Route:
        whole, joint = held_keys(call, held.tokens, call.layout.text), call.layout.text + _stream_rows(call)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            at = _moved(whole, k.shape[1] - joint)  # a layer may see less than the text before the image stream
            held.take(layer, LayerRows(k.detach()[:, at], v.detach()[:, at]))
            return own()

        return attend

    def reading(self, call: GenerationCall, held: HeldRows, attention: JointAttention) -> Route:
        run = call.run
        needs = run.needed([call.at.step] if call.at.observed else range(call.at.step, call.at.total))
        counts = run.counts(call.at.step) if run.ranking.known else run.budgeting.full
        if call.at.observed or self._config.cache_rows == "all":
            needs.append(held.limit)
        own = call.layout.text + call.layout.generation[1]
        held.arrange((), [counts, *needs], own, release=False)
        assert held.ranked is not None
        reads = held.reads(counts)
        if self._config.layers is not None:
            call.step.layers = tuple(reads)
        by_bank = _by_bank(attention, held.ranked, own, reads)
        mask, batch = self._adapter.mask(call.kwargs), call.kwargs[self._adapter.tokens].shape[0]
        columns = None if mask is None else reference_columns(mask, batch, call.layout)
        return to_stored(call, held.ranked, reads, by_bank, columns)


def _by_bank(attention: JointAttention, ranked: RankedCache, own: int, reads: Sequence[int]) -> list[bool]:
    """Whether each layer's rows are read where they lie; layers that read as many are alike."""
    known: dict[tuple[object, int], bool] = {}
    found = []
    for i, (site, count) in enumerate(zip(attention.layers, reads, strict=True)):
        processor = attention.sites[site].processor
        key = (chosen_backend(processor), count)
        if not ranked.holds(i):
            found.append(False)
            continue
        if key not in known:
            known[key] = processor is not None and prefers_bank(processor, ranked, i, own, count)
        found.append(known[key])
    return found


def held_keys(call: GenerationCall, tokens: Tensor | None, before: int) -> slice | Tensor:
    """Where the keys of the held `tokens` (None: all) lie in attention of a full call to its image stream, with rows
    `before` that, in order."""
    layout = replace(call.layout, text=before)
    if call.shortened is not None:
        rows = layout.reference_rows(call.device)[tokens]
        return before + torch.searchsorted(call.shortened.rows, rows)
    return reference_keys(layout, call.device)


def _stream_rows(call: GenerationCall) -> int:
    return call.layout.rows if call.shortened is None else call.shortened.rows.shape[0]


def _moved(rows: slice | Tensor, by: int) -> slice | Tensor:
    return slice(rows.start + by, rows.stop + by) if isinstance(rows, slice) else rows + by if by else rows


def reference_keys(layout: TokenLayout, device: torch.device) -> slice | Tensor:
    """Where the keys of all reference tokens lie in the joint attention of a call with every row, in order."""
    references = layout.references
    first, last = references[0].start, references[-1].start + references[-1].length
    if last - first == layout.reference_tokens:
        return slice(layout.text + first, layout.text + last)
    return layout.text + layout.reference_rows(device)
