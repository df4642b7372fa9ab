"""The reference cache of GLM-Image: ``GlmImageKVCache``, which each reference fills in a call of its own."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.cache_hooks import CacheHooks, Kwargs, LayerCache
from ...hooks.diffusers import internal
from ...types import TokenLayout

__all__ = ["GlmCacheHooks", "KeptReferences", "filled"]

Grid = tuple[int, int]


class KeptReferences:
    """What a cache holds of references, for the items of a batch.

    Parameters
    ----------
    layers : sequence
        The cache's own, each with a list of keys and one of values, (1, R, H, C), an entry for each prompt.
    tokens : Tensor, shape (prompts, R, D)
        Latents of the references, one behind another.
    grids : tuple of (int, int)
    batch : int
        Items of a call, as many of each prompt.
    """

    def __init__(self, layers: Sequence[Any], tokens: Tensor, grids: tuple[Grid, ...], batch: int) -> None:
        self.prompts, self.grids = tokens.shape[0], grids
        self.tokens = tokens.repeat_interleave(batch // self.prompts, 0)
        self.layers = [_Layer(layer, batch) for layer in layers]


class _Layer:
    """One layer of a cache for the items of a batch."""

    def __init__(self, own: Any, batch: int) -> None:
        self._own, self._batch = own, batch

    def get(self) -> tuple[Tensor, Tensor]:
        return self._of_batch(self._own.k_caches), self._of_batch(self._own.v_caches)

    def _of_batch(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0].expand(self._batch, -1, -1, -1)
        return torch.cat(parts).repeat_interleave(self._batch // len(parts), 0)

    def store(self, k: Tensor, v: Tensor) -> None:
        images = self._batch // len(self._own.k_caches)
        self._own.k_caches, self._own.v_caches = list(k[::images].split(1)), list(v[::images].split(1))


class _Noted:
    """What was noted of the calls that filled a cache: of each prompt the latents and the grid of each reference."""

    def __init__(self) -> None:
        self.prompts: list[list[tuple[Tensor, Grid]]] = []
        self._of_batch: dict[int, KeptReferences] = {}

    def note(self, filled: int, prompt: int, tokens: Tensor, grid: Grid) -> None:
        """Before a call: the cache has keys of `filled` prompts, and this one's go to those of `prompt`."""
        self._of_batch = {}
        del self.prompts[filled:]
        if prompt >= len(self.prompts):
            self.prompts.append([])
        self.prompts[min(prompt, filled)].append((tokens, grid))

    def of_batch(self, layers: Sequence[Any], batch: int) -> KeptReferences | None:
        """For a call of `batch` items; None where prompts differ in their references' sizes, or others are held."""
        if batch not in self._of_batch:
            grids = [tuple(grid for _, grid in references) for references in self.prompts]
            rows = sum(h * w for h, w in grids[0]) if grids else 0
            held = [int(k.shape[1]) for k in layers[0].k_caches]
            if not rows or held != [rows] * len(grids) or len({*grids}) > 1 or batch % len(grids):
                return None
            tokens = torch.cat([torch.cat([tokens for tokens, _ in each], 1) for each in self.prompts])
            self._of_batch[batch] = KeptReferences(layers, tokens, grids[0], batch)
        return self._of_batch[batch]


def filled(layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A cache of the model's own class with k and v (B, R, H, C) of each layer, to be read."""
    made = internal("models.transformers.transformer_glm_image", "GlmImageKVCache")(len(layers))
    for layer, (k, v) in zip(made.caches, layers, strict=True):
        layer.k_caches, layer.v_caches = list(k.split(1)), list(v.split(1))
    made.set_mode("read")
    return made


class GlmCacheHooks(CacheHooks):
    """A reference looks at itself alone, without a prompt and at time 0. The guided call without one reads none."""

    whole = "its references run before the steps, none of which has their rows"
    before_steps = True

    def __init__(self) -> None:
        self._noted: weakref.WeakKeyDictionary[Any, _Noted] = weakref.WeakKeyDictionary()

    def note(self, cache: Any, tokens: Tensor, grid: Grid) -> None:
        """A call on a reference of `tokens` (1, R, D) is about to fill a cache."""
        layer = cache[0]
        self._noted.setdefault(cache, _Noted()).note(len(layer.k_caches), layer.current_sample_idx, tokens, grid)

    def kept(self, cache: Any, batch: int) -> KeptReferences | None:
        """What a cache holds; None where it is not known."""
        noted = self._noted.get(cache)
        return None if noted is None else noted.of_batch(cache.caches, batch)

    def kept_by(self, transformer: nn.Module) -> bool:
        return True

    def of_call(self, kwargs: Kwargs) -> Any:
        return self.kept(kwargs["kv_caches"], kwargs["hidden_states"].shape[0])

    def layers(self, cache: KeptReferences) -> Sequence[LayerCache]:
        return cache.layers

    def passes(self, cache: KeptReferences) -> tuple[int, ...]:
        return tuple(h * w for h, w in cache.grids) * cache.prompts

    def spans(self, layout: TokenLayout) -> tuple[tuple[int, int], ...]:
        return tuple(pairwise(accumulate(layout.sizes, initial=0)))

    def make(self, transformer: nn.Module, layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
        return filled(layers)

    def reading(self, kwargs: Kwargs, cache: Any) -> Kwargs:
        return {**kwargs, "kv_caches": cache}

    def alone(self, kwargs: Kwargs) -> Kwargs:
        return {**kwargs, "kv_caches": None}
