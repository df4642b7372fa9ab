"""The prefix cache of Qwen-Image-2.1: ``QwenImage21KVCache``, which the first step fills with words and references."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...adapters.cache_hooks import CacheHooks, Kwargs, LayerCache
from ...functional import pack_rows
from ...hooks.diffusers import internal
from ...types import TokenLayout
from .slots import Slots, without_references

__all__ = ["Qwen21CacheHooks"]

Pair = tuple[Tensor, Tensor]


class _Layer:
    """The reference rows of one layer of a cache; where they are handed back, the model's own keeps the words'."""

    def __init__(self, own: Any, text: Tensor, parts: Sequence[tuple[int, int]]) -> None:
        self._own, self._text, self._parts = own, text, parts
        self._given: Pair | None = None

    def get(self) -> Pair:
        if self._given is not None:
            return self._given
        k, v = (self._references(x) for x in self._own.get())
        return k, v

    def _references(self, x: Tensor) -> Tensor:
        parts = [x[:, start : start + rows] for start, rows in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @property
    def words(self) -> Pair:
        k, v = self._own.get()
        return (k, v) if self._given is not None else (pack_rows(k, self._text), pack_rows(v, self._text))

    def store(self, k: Tensor, v: Tensor) -> None:
        if self._given is None:
            self._own.store(*self.words)
        self._given = k, v


class Qwen21CacheHooks(CacheHooks):
    """Words see what stands before them, a reference besides itself, and neither the time nor the generation."""

    whole = "its references run among the words of the prompt, as whole pictures"
    text = True

    def __init__(self) -> None:
        self._slots: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._layers: weakref.WeakKeyDictionary[Any, list[_Layer]] = weakref.WeakKeyDictionary()

    def slots(self, kwargs: Kwargs) -> Slots:
        """Of a call; looked up once for a mask."""
        mask = kwargs["img_mask"]
        if mask not in self._slots:
            self._slots[mask] = Slots.of(mask, kwargs["img_shapes"][0])
        return self._slots[mask]

    def kept_by(self, transformer: nn.Module) -> bool:
        return bool(transformer.config.causal_condition)  # type: ignore[union-attr]

    def of_call(self, kwargs: Kwargs) -> Any:
        return kwargs["kv_cache"]

    def of_output(self, kwargs: Kwargs, layout: TokenLayout, output: Any) -> Any:
        cache, slots = kwargs["kv_cache"], self.slots(kwargs)
        parts = list(zip(slots.places, layout.sizes, strict=True))
        self._layers[cache] = [_Layer(layer, slots.text, parts) for layer in cache.layer_caches]
        return cache

    def layers(self, cache: Any) -> Sequence[LayerCache]:
        return self._layers[cache]

    def spans(self, layout: TokenLayout) -> tuple[tuple[int, int], ...]:
        return tuple((start, start + rows) for start, rows in zip(layout.places, layout.sizes, strict=True))

    def make(self, transformer: nn.Module, layers: Sequence[Pair]) -> Any:
        made = internal("models.transformers.transformer_qwenimage21", "QwenImage21KVCache")(len(layers))
        for layer, (k, v) in zip(made.layer_caches, layers, strict=True):
            layer.store(k, v)
        return made

    def reading(self, kwargs: Kwargs, cache: Any) -> Kwargs:
        """The words' rows before those of `cache`, which are references'."""
        own, stored = self._layers[kwargs["kv_cache"]], [layer.get() for layer in cache.layer_caches]
        pairs = [
            (torch.cat([a, k], 1), torch.cat([b, v], 1))
            for (a, b), (k, v) in zip((layer.words for layer in own), stored, strict=True)
        ]
        return self._short(kwargs, pairs, stored[0][0].shape[1])

    def alone(self, kwargs: Kwargs) -> Kwargs:
        return self._short(kwargs, [layer.words for layer in self._layers[kwargs["kv_cache"]]], 0)

    def _short(self, kwargs: Kwargs, pairs: Sequence[Pair], stored: int) -> Kwargs:
        return without_references(kwargs, self.slots(kwargs), stored) | {"kv_cache": self.make(None, pairs)}  # type: ignore[arg-type]
