"""Stored references that each tile of generation tokens reads by its own ranking, the rest by the means of cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import Adapter, Kwargs
from ...adapters.mask_columns import beside, reference_columns
from ...config import SparseRef
from ...cost import ModelShape, reference_kv_bytes, tile_bytes
from ...errors import BudgetError, IncompatibleError
from ...execution import Cache
from ...functional import HostOffsets, attention_mass, gather_attention
from ...hooks.diffusers import Attention, Route, of_heads
from ...ops.attention_mass.backends import keys_read
from ...ops.with_lse import attention_with_lse
from ...reference_cache import Tiling
from ...run import Counts, Run, covering
from ...types import TokenLayout
from ..call import GenerationCall
from ..steps import RunStep
from .by_rank import reference_keys
from .held_tiles import HeldTiles, cells_of
from .joint import JointAttention
from .seen import SeenKeys

__all__ = ["ByTile", "computed"]

Grid = tuple[int, int]


class ByTile:
    """How `HeldTiles` are filled by full calls, which measure every layer, and read by cached ones.

    Parameters
    ----------
    adapter : Adapter
    config : SparseRef
        With a ``Cache(per="tile")``.
    """

    measures = True

    def __init__(self, adapter: Adapter, config: SparseRef) -> None:
        assert isinstance(config.execute, Cache)
        self._adapter, self._config, self._way = adapter, config, config.execute

    def check(self, module: nn.Module, layout: TokenLayout, kwargs: Kwargs) -> None:
        """Raise IncompatibleError where a grid is not known, or the call's mask is none of keys."""
        self._grid(kwargs, layout)
        cells_of(self._way, layout)
        self._adapter.keys(kwargs)

    def _grid(self, kwargs: Kwargs, layout: TokenLayout) -> Grid:
        grid = self._adapter.grid(kwargs, layout)
        if grid is None or grid[0] * grid[1] != layout.generation[1]:
            raise IncompatibleError(
                f'per="tile" needs the height and width in tokens of the {layout.generation[1]} generation tokens, got '
                f'{grid} from the {self._adapter.name} adapter (PlainAdapter(grid=...) tells them): use per="run"'
            )
        return grid

    def room(self, shape: ModelShape, run: Run, at: RunStep, kwargs: Kwargs) -> tuple[int, int]:
        layout, batch = run.layout, kwargs[self._adapter.tokens].shape[0]
        tiling, cells = Tiling(layout.text, self._grid(kwargs, layout), self._way.tile), cells_of(self._way, layout)
        tiles, means = len(tiling.sizes), 0 if cells is None else cells.count
        most, rows = self._most(run, at, range(at.total)), layout.reference_tokens
        lists = tile_bytes(shape, tiles, sum(most), means, batch)
        return rows, reference_kv_bytes(shape, rows + means, batch) + lists

    def _most(self, run: Run, at: RunStep, steps: range) -> Counts:
        """The most tokens that a tile ranks for any of `steps`, all where that is not known yet; none where each of
        them reads all or none."""
        budget, full = self._config.budget, run.budgeting.full
        unknown = not run.ranking.known and (budget.needs_mass or self._config.guard is not None)
        if unknown or (at.observed and budget.varies != "never"):
            return full
        counts = [run.counts(step) for step in (steps[:1] if at.observed else steps)]
        return covering([each for each in counts if _some(each, full)] or [(0,) * len(full)])

    def empty(self, call: GenerationCall, attention: JointAttention) -> HeldTiles:
        batch, grid = call.kwargs[self._adapter.tokens].shape[0], self._grid(call.kwargs, call.layout)
        return HeldTiles(call.run, len(attention.layers), grid, call.layout, batch, call.device)

    # -- full calls ----------------------------------------------------------------------------

    def storing(self, call: GenerationCall, held: HeldTiles, attention: JointAttention) -> Route:
        seen = SeenKeys.of(self._adapter, call.kwargs, call.layout)
        call.heard, whole = seen.check, reference_keys(call.layout, call.device)
        held.cache.hide(seen.references)
        ranking = self.ranking(call, held, attention, seen.keys)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            seen.hear(mask, seen.keys, held.batch)
            with torch.no_grad():
                held.take(layer, *(computed(x.detach())[:, whole] for x in (k, v)))
            return ranking(layer, q, k, v, mask, own)

        return attend

    def ranking(
        self, call: GenerationCall, held: HeldTiles, attention: JointAttention, keys: Tensor | None = None
    ) -> Route:
        """Joint attention to every row, of all rows or of text and generation alone, by which tiles rank where a later
        step reads a part; `keys` (B, text + rows) bool are those that may be attended to."""
        run, layout = call.run, call.layout
        most = self._most(run, call.at, range(call.at.step + 1, call.at.total))
        ranks = sum(most) > 0

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            site = attention.layers[layer]
            measured = call.measures and run.profile.measures(call.at.step, site)
            if not ranks and not measured:
                return own()
            out, lse = attention_with_lse(own, q, k, mask)
            with torch.no_grad():
                mass = _mass(call, held, q.detach(), k.detach(), lse, keys)
                if ranks:
                    held.ranking.rank(layer, mass, most)
                    if self._way.rest == "weighted":
                        held.cache.weigh(layer, held.ranking.pooled(mass))
                if measured:
                    pooled = held.ranking.pooled(mass)[layout.conditional or slice(None)]
                    run.observed(call.at.step, site, pooled)
            return out

        return attend

    # -- cached calls --------------------------------------------------------------------------

    def reads_a_part(self, call: GenerationCall) -> bool:
        """Whether a cached call reads some stored tokens, and not all."""
        run = call.run
        return run.ranking.known and _some(run.counts(call.at.step), run.budgeting.full)

    def reading(self, call: GenerationCall, held: HeldTiles, attention: JointAttention) -> Route:
        run, layout = call.run, call.layout
        counts = run.counts(call.at.step) if run.ranking.known else run.budgeting.full
        seen = SeenKeys.of(self._adapter, call.kwargs, layout)
        call.heard = seen.check
        held.check(seen.references)
        if not self.reads_a_part(call):
            return self._whole(call, held)
        if not held.ranking.knows(counts):
            raise BudgetError(f"a step must read no more tokens than its tiles have ranked, got a budget of {counts}")
        call.step.means = 0 if held.cells is None else held.cells.count
        call.step.read = held.ranking.read(counts)
        record = held.record()
        if call.step.calls == 0:
            run.record.tiles = record
        own, packed = seen.own, seen.packed()
        rows_q = rows_k = None
        given: dict[str, Any] = {}
        if packed is not None:
            rows_q, rows_k = packed.known(held.tiling.rows, call.step.means)
            given = {
                "cu_seqlens_q": torch.tensor(rows_q, dtype=torch.int32, device=call.device),
                "cu_seqlens_k": torch.tensor(rows_k, dtype=torch.int32, device=call.device),
            }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, user: Attention) -> Tensor:
            seen.hear(mask, own, held.batch)
            found, (k_ref, v_ref), (k2, v2) = (
                held.ranking.selection(layer, counts),
                held.cache.rows(layer),
                held.cache.means(layer),
            )
            record.reads[layer] = (found.indices, found.known)
            q, k, v = (computed(x) for x in (q, k, v))
            wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
            q = q.index_select(1, held.order.to(q.device))
            if packed is not None:
                q = q.flatten(0, 1)
                k, v = (x.flatten(0, 1).index_select(0, packed.rows) for x in (k, v))
                k2, v2 = (None if x is None else x.flatten(0, 1) for x in (k2, v2))
            out = gather_attention(
                q, k, v, k_ref, v_ref, found.indices, found.offsets, k2=k2, v2=v2, cu_tiles=held.tiles.to(q.device),
                bias=found.bias, host=HostOffsets(rows_q, rows_k, [found.known], held.tiles_known),
                backend="reference" if wanted else "auto", **given,
            )  # fmt: skip
            return out.view(held.batch, -1, *out.shape[-2:]).index_select(1, held.places.to(q.device))

        return attend

    def _whole(self, call: GenerationCall, held: HeldTiles) -> Route:
        """Every stored row, after the call's own."""
        mask, tokens = self._adapter.mask(call.kwargs), call.layout.reference_tokens
        columns = None if mask is None else reference_columns(mask, held.batch, call.layout)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            masked = beside(mask, columns, tokens, k.shape[1], held.batch, before=False)
            keys, values = (torch.cat(pair, 1) for pair in zip((k, v), held.cache.rows(layer), strict=True))
            return own(keys, values, masked)

        return attend


def _some(counts: Counts, full: Counts) -> bool:
    """Whether some tokens are read, and not all."""
    return 0 < sum(counts) < sum(full)


def computed(x: Tensor) -> Tensor:
    """As scaled_dot_product_attention casts under autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _mass(
    call: GenerationCall, held: HeldTiles, q: Tensor, k: Tensor, lse: Tensor | None, keys: Tensor | None
) -> Tensor:
    """Mean attention (B, tiles, R) of each tile's queries to the reference tokens, the heads' mean."""
    layout, heads, record = call.layout, q.shape[2], call.run.record
    first, length = layout.text, layout.generation[1]
    if q.shape[1] > first + length:
        first += layout.generation[0]
    order = held.generation.to(q.device)
    queries = q[:, first : first + length].index_select(1, order)
    lse = None if lse is None else lse[..., first : first + length].index_select(-1, order)
    start = layout.references[0].start
    span = (layout.text + start, layout.text + layout.references[-1].start + layout.references[-1].length)
    k = of_heads(k, heads)
    mass = attention_mass(
        queries, k, span, key_mask=keys, lse=lse, reduce_heads=True, tiles=held.generation_tiles.to(q.device),
        host=held.generation_tiles_known,
    )  # fmt: skip
    read = span[1] - span[0] if lse is not None else keys_read(queries, k, span[1] - span[0])
    record.scoring_flops += 2.0 * held.batch * heads * q.shape[3] * length * read
    if mass.shape[-1] > layout.reference_tokens:
        mass = mass.index_select(-1, layout.reference_rows(mass.device) - start)
    return mass
