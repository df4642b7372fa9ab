"""FLUX.2 dev, FLUX.2 Klein, its inpainting and Klein-KV: ``Flux2Transformer2DModel``.

Order text | generation | references; Klein-KV has text | references | generation in its first
("extract") step, and afterwards no reference rows but their cached K/V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...adapters.alone import ReferencesAlone
from ...adapters.base import Adapter, Found, Kwargs
from ...adapters.collate import flat_ids, same, stack
from ...adapters.depth import DepthCut
from ...adapters.masks import cut_in_block
from ...adapters.position_ids import grid_of_ids, place_by_ids, references_from_ids
from ...adapters.row_arguments import by_token, take_rows
from ...errors import LayoutError
from ...hooks.diffusers import encoded_reference, packed_reference
from ...run import AttentionView
from ...selection import Reduced
from ...types import Reference, TokenLayout
from .cache import Flux2CacheHooks
from .modulation import per_row_modulation
from .published import PIPELINES, PUBLISHED

__all__ = ["Flux2Adapter"]

# Modulation is shared by all blocks; in Klein-KV's extract step it runs again for the references, which have a fixed
# timestep.
_STREAMS = {
    r"x_embedder": "image",
    r"context_embedder": "text",
    r"time_guidance_embed\..+": "reference_item",
    r"(double_stream_modulation_img|single_stream_modulation)\.linear": "reference_item",
    r"double_stream_modulation_txt\.linear": "item",
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_qkv|to_out\.0)": "image",
    r"transformer_blocks\.\d+\.ff\..+": "image",
    r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_added_qkv|to_add_out)": "text",
    r"transformer_blocks\.\d+\.ff_context\..+": "text",
    r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)": "joint",
    r"norm_out\.linear": "item",
    r"proj_out": "output",
}


class Flux2Adapter(Adapter):
    """References have frames 10, 20, ... in ``img_ids``. Text padding tokens always stay: in FLUX.2
    colour and style flow from the references through them."""

    name = "FLUX.2"
    classes = ("diffusers.models.transformers.transformer_flux2.Flux2Transformer2DModel",)
    needs = ("img_ids", "txt_ids")
    pipelines = PIPELINES
    published = PUBLISHED
    streams = _STREAMS
    stacks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
    per_item = ("hidden_states", "encoder_hidden_states", "timestep", "guidance")
    processors = (
        "Flux2AttnProcessor",
        "Flux2ParallelSelfAttnProcessor",
        "Flux2KVAttnProcessor",
        "Flux2KVParallelSelfAttnProcessor",
    )
    packs = True
    parts = (
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "norm_out.linear",
    )
    cache = Flux2CacheHooks()
    alone = ReferencesAlone()

    def layout_key(self, kwargs: Kwargs) -> object:
        return kwargs.get("kv_cache_mode"), kwargs.get("num_ref_tokens") or 0

    def find(self, kwargs: Kwargs) -> Found | None:
        ids = kwargs.get("img_ids")
        if ids is None:
            return None
        first = kwargs.get("num_ref_tokens") or 0
        if not (self.extracts(kwargs) and first):
            return references_from_ids(ids)
        rows = ids.shape[-2]
        moved = torch.cat([ids[..., first:, :], ids[..., :first, :]], -2)
        found = references_from_ids(moved)
        if found is None or found[0] != (0, rows - first):
            return None
        references = tuple(Reference(r.start - (rows - first), r.length, r.grid) for r in found[1])
        return (first, rows - first), references

    def cached(self, kwargs: Kwargs) -> bool:
        return kwargs.get("kv_cache_mode") == "cached" and kwargs.get("kv_cache") is not None

    def extracts(self, kwargs: Kwargs) -> bool:
        return kwargs.get("kv_cache_mode") == "extract"

    def mask(self, kwargs: Kwargs) -> Any:
        """Attention that stores or reads reference K/V takes no mask: the model leaves one unread there."""
        stores = self.extracts(kwargs) and kwargs.get("num_ref_tokens")
        return None if stores or self.cached(kwargs) else super().mask(kwargs)

    def notes(self, kwargs: Kwargs) -> list[str]:
        unread = super().mask(kwargs) is not None and self.mask(kwargs) is None
        text = (
            "the attention mask has no effect: the model reads none where it stores or reads reference keys and values"
        )
        return [text] if unread else []

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        return grid_of_ids(kwargs["img_ids"], layout)

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        axes = {"hidden_states": 1, "img_ids": -2, **by_token(kwargs, layout.rows)}
        kwargs = take_rows(self.cut_mask(kwargs, layout, rows), axes, rows)
        return self._count(kwargs, layout, rows.shape[0])

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        kwargs = place_by_ids(self.reduce_mask(kwargs, layout, reduced), layout, reduced)
        return self._count(kwargs, layout, kwargs["hidden_states"].shape[1])

    def _count(self, kwargs: Kwargs, layout: TokenLayout, rows: int) -> Kwargs:
        if self.extracts(kwargs):
            kwargs["num_ref_tokens"] = rows - layout.generation[1]
        return kwargs

    def cannot_join(self, kwargs: Kwargs) -> str | None:
        mode = kwargs.get("kv_cache_mode")
        if mode is not None:
            return f"a call that keeps reference K/V runs alone (kv_cache_mode={mode!r})"
        return self._not_of_keys(kwargs)

    def join(self, items: Sequence[Kwargs], shared_time: bool | None = None) -> Kwargs:
        times = {name: stack(items, name) for name in ("timestep", "guidance")}
        if shared_time is None:
            shared_time = all(t is None or bool((t == t[0]).all()) for t in times.values())
        if shared_time:
            times = {name: None if t is None else t[:1] for name, t in times.items()}
        rows = {
            name: torch.cat([item[name] for item in items], 1) for name in ("hidden_states", "encoder_hidden_states")
        }
        ids = {name: torch.cat([flat_ids(item[name]) for item in items]) for name in ("img_ids", "txt_ids")}
        return {**same(items, {*self.per_item, *ids}), **times, **rows, **ids}

    def joined_hooks(self, transformer: nn.Module, running: Callable[[], Any]) -> list[Callable[[], None]]:
        return per_row_modulation(transformer, running)

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        """The single blocks get text and image as one stream."""
        cos, sin = kwargs["image_rotary_emb"]
        kwargs = cut_in_block(kwargs, "joint_attention_kwargs", kwargs["hidden_states"].shape[0], cos.shape[0], cut)
        rotary = cut.table(cos, joint=True), cut.table(sin, joint=True)
        rows = cut.rows(kwargs["hidden_states"], joint=kind == "single")
        return {**kwargs, "hidden_states": rows, "image_rotary_emb": rotary}

    def view(self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionView | None:
        if layout.generation[0] == 0:
            return super().view(layout, q, k, v, mask)
        at, count = layout.text, layout.reference_tokens
        if q.shape[1] == k.shape[1] == count:
            spans = tuple((r.start, r.start + r.length) for r in layout.references)
            return AttentionView(k, v, None, q, spans)
        if (q.shape[1], k.shape[1]) != (at + layout.generation[1], at + layout.rows):
            raise LayoutError(
                f"attention must run from {at + layout.generation[1]} rows to {at + layout.rows}, or from and to the "
                f"{count} of the references, got {q.shape[1]} queries and {k.shape[1]} keys"
            )
        spans = tuple((at + r.start, at + r.start + r.length) for r in layout.references)
        return AttentionView(k, v, q[:, at:], None, spans)

    def encode(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        latents = encoded_reference(pipe, pixels)
        return packed_reference(pipe, latents), (latents.shape[-2], latents.shape[-1])
