"""Reference K/V that a model itself keeps between steps, of which each tile of generation tokens reads its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...adapters.base import Adapter, Kwargs
from ...config import SparseRef
from ...run import Run
from ..call import GenerationCall
from .by_tile import ByTile, computed
from .held_tiles import HeldTiles
from .joint import UNCOMPILED, LookedAt
from .model_cache import CacheKeeper
from .model_rows import RankedKeeper

__all__ = ["TiledKeeper", "keeper_of"]


class TiledKeeper(CacheKeeper[HeldTiles]):
    """A `CacheKeeper` with a ``Cache(per="tile")``: the rows stay the model's own, and beside them stand the tiles'
    rankings and the means of cells.

    The call that stores measures every layer; so do those of profiling steps, which read everything.
    """

    measures = True

    def __init__(self, adapter: Adapter, config: SparseRef) -> None:
        super().__init__(adapter, config)
        self._form, self._looked = ByTile(adapter, config), LookedAt(adapter)

    @property
    def alone(self) -> bool:
        return self._looked.last.stays_compiled

    def install(self, module: nn.Module) -> None:
        self._looked.install(module)

    def begin(self, module: nn.Module, run: Run, kwargs: Kwargs) -> None:
        super().begin(module, run, kwargs)
        self._form.check(module, run.layout, kwargs)
        if self._looked.look_at(module).runs_uncompiled:
            run.record.notes.append(UNCOMPILED)

    def forget(self) -> None:
        super().forget()
        self._looked.remove()

    def _empty(self, call: GenerationCall, whole: bool) -> HeldTiles:
        held = self._form.empty(call, self._looked.last)
        self._rank(call, held)
        return held

    def _filled(self, held: HeldTiles, cache: Any) -> None:
        for i, layer in enumerate(self.hooks.layers(cache)):
            k, v = (computed(x.detach()).contiguous() for x in layer.get())
            held.cache.adopt(i, k, v)

    def _resumed(self, call: GenerationCall, cache: Any) -> HeldTiles:
        held = self._form.empty(call, self._looked.last)
        self._filled(held, cache)
        return held

    def _found(self, call: GenerationCall, cache: Any) -> HeldTiles:
        return self._resumed(call, cache)

    def _read(self, call: GenerationCall, kwargs: Kwargs, held: HeldTiles, cache: Any) -> Kwargs:
        call.contexts.callback(self._account, call, held, cache)  # what the tiles read is listed in the call
        if call.plan.selection is not None and self._form.reads_a_part(call):
            attend = self._form.reading(call, held, self._looked.last)
            self._looked.last.answer(call, self._own(call), attend, eager=False)
            kwargs = self.hooks.alone(kwargs)
        elif call.plan.kind == "profile":
            self._rank(call, held)
        return kwargs

    def _rank(self, call: GenerationCall, held: HeldTiles) -> None:
        """Let tiles rank by the attention of text and generation to every row, as this call computes it."""
        own, attention = self._own(call), self._looked.last
        attend = self._form.ranking(call, held, attention)
        attention.answer(call, own, attend, eager=True, keys=own + call.layout.reference_tokens)

    def _own(self, call: GenerationCall) -> int:
        return call.layout.text + call.layout.generation[1]

    def _bytes(self, held: HeldTiles, cache: Any) -> int:
        return held.nbytes


def keeper_of(adapter: Adapter, config: SparseRef) -> CacheKeeper[Any] | None:
    """Who follows the caches of a model that keeps its references' keys and values itself; None for other families."""
    if adapter.cache is None:
        return None
    return TiledKeeper(adapter, config) if config.per == "tile" else RankedKeeper(adapter, config)
