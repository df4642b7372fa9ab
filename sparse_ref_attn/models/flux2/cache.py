"""The reference cache of FLUX.2 Klein-KV: ``Flux2KVCache``, filled by the first step and read by the others."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...adapters.cache_hooks import CacheHooks, Kwargs, LayerCache
from ...adapters.masks import without_mask
from ...hooks.diffusers import internal
from ...types import TokenLayout

__all__ = ["Flux2CacheHooks", "keep_references"]


def keep_references(transformer: nn.Module) -> None:
    """Give a FLUX.2 transformer the processors with which its pipeline keeps the references' keys and values."""
    for blocks, name in (
        (transformer.transformer_blocks, "Flux2KVAttnProcessor"),
        (transformer.single_transformer_blocks, "Flux2KVParallelSelfAttnProcessor"),
    ):
        processor = internal("models.transformers.transformer_flux2", name)
        for block in blocks:  # type: ignore[union-attr]
            block.attn.set_processor(processor())


class Flux2CacheHooks(CacheHooks):
    """Its references see no prompt, no noise and no timestep: their K/V depend on their own tokens alone."""

    def kept_by(self, transformer: nn.Module) -> bool:
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]  # type: ignore[misc]
        return all("kv_cache" in inspect.signature(block.attn.processor.__call__).parameters for block in blocks)

    def of_call(self, kwargs: Kwargs) -> Any:
        return kwargs["kv_cache"]

    def of_output(self, kwargs: Kwargs, layout: TokenLayout, output: Any) -> Any:
        return output[1] if isinstance(output, tuple) else output.kv_cache

    def of_attention(self, kwargs: Kwargs) -> LayerCache | None:
        return kwargs.get("kv_cache")

    def layers(self, cache: Any) -> Sequence[LayerCache]:
        return [*cache.double_block_caches, *cache.single_block_caches]

    def make(self, transformer: nn.Module, layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
        made = internal("models.transformers.transformer_flux2", "Flux2KVCache")(
            len(transformer.transformer_blocks),  # type: ignore[arg-type]
            len(transformer.single_transformer_blocks),  # type: ignore[arg-type]
        )
        made.num_ref_tokens = layers[0][0].shape[1]
        for layer, (k, v) in zip(self.layers(made), layers, strict=True):
            layer.store(k, v)
        return made

    def reading(self, kwargs: Kwargs, cache: Any) -> Kwargs:
        return {**kwargs, "kv_cache": cache, "kv_cache_mode": "cached"}

    def alone(self, kwargs: Kwargs) -> Kwargs:
        # The model's own attention to a cache reads no mask, so this must not either.
        kwargs = without_mask(kwargs, "joint_attention_kwargs")
        return {**kwargs, "kv_cache": None, "kv_cache_mode": None}

    def resumed(self, kwargs: Kwargs, layout: TokenLayout, cache: Any) -> Kwargs:
        first, length = layout.generation
        kwargs = {**kwargs, "num_ref_tokens": 0}
        for name, axis in (("hidden_states", 1), ("img_ids", -2)):
            kwargs[name] = kwargs[name].narrow(axis, first, length)
        return self.reading(kwargs, cache)

    def returned(self, output: Any, cache: Any) -> Any:
        if isinstance(output, tuple):
            return (*output, cache)
        output.kv_cache = cache
        return output

    def conditions(self, kwargs: Kwargs) -> str:
        guidance = kwargs.get("guidance")
        return (
            f"ref_fixed_timestep={float(kwargs.get('ref_fixed_timestep') or 0.0)}, "
            f"guidance={None if guidance is None else guidance.flatten()[:1].tolist()}, "
            f"scale={(kwargs.get('joint_attention_kwargs') or {}).get('scale', 1.0)}"
        )
