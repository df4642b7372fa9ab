"""Reference K/V of an earlier run in place of the step that computes them, and keeping this run's for a later one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.classes import full_name
from ..adapters.weights import weights_fingerprint
from ..config import SparseRef
from ..errors import ConfigError, LayoutError
from ..record import RunRecord
from ..reference_cache import ReferenceCache
from ..reference_cache.saved import Source
from ..selection import Ranking
from ..selection.ranking import fingerprint
from ..types import TokenLayout

__all__ = ["CacheReuse"]


class CacheReuse:
    """What a patch takes from earlier runs, and keeps for later ones.

    Parameters
    ----------
    adapter : Adapter
    config : SparseRef
    conditions : callable
        From a call's arguments to what changes the K/V beside the references, in words (may sync).
    """

    def __init__(self, adapter: Adapter, config: SparseRef, conditions: Callable[[Kwargs], str]) -> None:
        self._adapter, self._config, self._conditions = adapter, config, conditions
        self.given: ReferenceCache | None = None
        self.capturing = False
        self.captured: ReferenceCache | None = None
        self._source: Source | None = None

    def source(self, module: nn.Module, kwargs: Kwargs, layout: TokenLayout, tokens: Tensor) -> Source:
        """What an extract call's K/V are computed of (two syncs)."""
        return Source(
            model=f"{self._adapter.name} ({full_name(type(module))})",
            weights=weights_fingerprint(module),
            conditions=self._conditions(kwargs),
            references=fingerprint(tokens),
            sizes=layout.sizes,
            grids=tuple(reference.grid for reference in layout.references),
        )

    def check(self, module: nn.Module, kwargs: Kwargs, layout: TokenLayout, tokens: Tensor) -> None:
        """Raise LayoutError where the given K/V are not those that this extract call would compute."""
        given = self.given
        layers = sum(site.kind != "other" for site in self._adapter.sites(module))
        assert given is not None
        if len(given.layers) != layers:
            raise LayoutError(f"a reused reference cache must have {layers} layers, got {len(given.layers)}")
        if (given.dtype, given.device) != (tokens.dtype, tokens.device):
            raise LayoutError(
                f"a reused reference cache must be in {tokens.dtype} on {tokens.device}, got {given.dtype} on "
                f"{given.device}; ReferenceCache.to(device) moves it, and another dtype must be computed anew"
            )
        if given.layers[0][0].shape[0] not in (1, tokens.shape[0]):
            raise LayoutError(
                f"a reused reference cache must be of 1 item or of the call's {tokens.shape[0]}, "
                f"got {given.layers[0][0].shape[0]}"
            )
        given.source.check(self.source(module, kwargs, layout, tokens))
        if not given.complete and self._config.per == "tile":
            raise ConfigError(
                'per="tile" ranks by the attention to every token: a reused reference cache must hold all of the '
                f"{layout.reference_tokens}, got {len(given.tokens)}"
            )
        if not given.complete and (self._config.budget.needs_mass or self._config.guard is not None):
            raise ConfigError(
                f"a reused reference cache of {len(given.tokens)} of {layout.reference_tokens} tokens brings its own "
                "ranking, and no attention is measured: the budget must not need it and guard must be None, got "
                f"{self._config.budget} and {self._config.guard}"
            )

    def ranked(self, module: nn.Module, kwargs: Kwargs, layout: TokenLayout, tokens: Tensor) -> list[Tensor] | None:
        """Scores that a run which begins must go by; raises as `check` where the given K/V are not its own."""
        if self.given is None:
            return None
        self.check(module, kwargs, layout, tokens)
        if self.given.complete:
            return None
        assert self.given.ranking is not None
        return [score.to(self.given.device, copy=True) for score in self.given.ranking.scores]

    def note(self, record: RunRecord) -> None:
        """Say what was reused."""
        if self.given is None:
            return
        text = f"the references' keys and values are those of an earlier run, {len(self.given.tokens)} of "
        text += f"{record.layout.reference_tokens} tokens"
        if not self.given.complete:
            text += f", and so is the ranking ({self.given.chosen_by})"
        record.notes.append(text)

    def layers(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """The given k and v for `batch` items; views."""
        assert self.given is not None
        return [(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self.given.layers]

    def wants(self, module: nn.Module, kwargs: Kwargs, layout: TokenLayout, tokens: Tensor) -> bool:
        """Before an extract call: whether its K/V are to be kept after the run."""
        self._source = self.source(module, kwargs, layout, tokens) if self.capturing else None
        return self.capturing

    def keep(
        self, layers: Sequence[tuple[Tensor, Tensor]], held: Tensor | None, record: RunRecord, tokens: Tensor
    ) -> None:
        """After it: keep what it computed of `tokens` in each layer, the rows of the tokens `held` or of all."""
        source, self._source = self._source, None
        if source is None:
            return
        alike = torch.equal(tokens[:1].expand_as(tokens), tokens)
        layers = [(k[:1], v[:1]) for k, v in layers] if alike else layers
        ranking = None
        if held is not None:
            assert record.scores is not None
            ranking = Ranking(tuple(record.scores), source.grids, source.model, source.references)
        all_tokens = torch.arange(record.layout.reference_tokens, device=tokens.device)
        self.captured = ReferenceCache(
            [(k.detach(), v.detach()) for k, v in layers],
            all_tokens if held is None else held,
            source,
            ranking,
            "" if held is None else self._config.describe(),
        )
