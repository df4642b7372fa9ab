"""FLUX.1 Kontext, and its inpainting: ``FluxTransformer2DModel``, order text | generation | reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..hooks.diffusers import encoded_reference, packed_reference, rotate_pairs
from ..selection import Reduced
from ..types import TokenLayout
from .base import Adapter, Found, Kwargs, grid_of_ids, references_from_ids, take_rows
from .depth import DepthCut
from .joining import flat_ids, pad, same, stack
from .masks import cut_in_block
from .streams import FLUX_STREAMS

__all__ = ["FluxAdapter", "place_by_ids"]

_IDS = {"img_ids": "hidden_states", "txt_ids": "encoder_hidden_states"}


def place_by_ids(kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
    """Replace the reference rows of ``hidden_states`` and ``img_ids`` (frame, y, x, ...).

    A reduced token keeps its reference's frame and takes its position in the grid's own units.
    """
    x, ids = kwargs["hidden_states"], kwargs["img_ids"]
    rows, positions = [], []
    at = 0
    flat = ids.float()
    for reference, new in zip(layout.references, reduced, strict=True):
        rows.append(x[:, at : reference.start])
        rows.append(new.tokens.to(x.dtype))
        positions.append(flat[..., at : reference.start, :])
        origin = flat[..., reference.start : reference.start + 1, :]
        moved = origin.expand(*origin.shape[:-2], new.positions.shape[0], origin.shape[-1]).clone()
        moved[..., 1:3] += new.positions.to(moved)
        positions.append(moved)
        at = reference.start + reference.length
    rows.append(x[:, at:])
    positions.append(flat[..., at:, :])
    return {**kwargs, "hidden_states": torch.cat(rows, 1), "img_ids": torch.cat(positions, -2)}


class FluxAdapter(Adapter):
    """Kontext's reference tokens have frame 1 in ``img_ids``; any frame other than the first row's counts."""

    name = "FLUX.1 Kontext"
    classes = ("diffusers.models.transformers.transformer_flux.FluxTransformer2DModel",)
    needs = ("img_ids", "txt_ids")
    streams = FLUX_STREAMS
    stacks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
    per_item = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
    parts = ("pos_embed",)
    processors = ("FluxAttnProcessor",)

    def find(self, kwargs: Kwargs) -> Found | None:
        if kwargs.get("img_ids") is None or kwargs.get("controlnet_block_samples") is not None:
            return None
        return references_from_ids(kwargs["img_ids"])

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        return grid_of_ids(kwargs["img_ids"], layout)

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        return take_rows(self.cut_mask(kwargs, layout, rows), {"hidden_states": 1, "img_ids": -2}, rows)

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        return place_by_ids(self.reduce_mask(kwargs, layout, reduced), layout, reduced)

    def cannot_join(self, kwargs: Kwargs) -> str | None:
        named = ("controlnet_block_samples", "controlnet_single_block_samples")
        unpadded = (f"{name} cannot be padded" for name in named if kwargs.get(name) is not None)
        return next(unpadded, None) or self._not_of_keys(kwargs)

    def join(self, items: Sequence[Kwargs], shared_time: bool | None = None) -> Kwargs:
        own = {name: stack(items, name) for name in ("pooled_projections", "timestep", "guidance")}
        rows = {name: pad(items, name) for name in ("hidden_states", "encoder_hidden_states")}
        # The tables that the model makes of these are not used: `rotary` has each item's own.
        ids = {name: rows[of].new_zeros(rows[of].shape[1], 3) for name, of in _IDS.items()}
        return {**same(items, {*self.per_item, *_IDS}), **own, **rows, **ids}

    def rotary(self, transformer: nn.Module, kwargs: Kwargs) -> tuple[Tensor, ...]:
        return transformer.pos_embed(torch.cat([flat_ids(kwargs["txt_ids"]), flat_ids(kwargs["img_ids"])]))  # type: ignore[operator]

    def rotate(self, rotary: Sequence[Tensor], x: Tensor) -> Tensor:
        return rotate_pairs(x, *rotary)

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        x, (cos, sin) = kwargs["hidden_states"], kwargs["image_rotary_emb"]
        kwargs = cut_in_block(kwargs, "joint_attention_kwargs", x.shape[0], cos.shape[0], cut)
        rotary = cut.table(cos, joint=True), cut.table(sin, joint=True)
        return {**kwargs, "hidden_states": cut.rows(x), "image_rotary_emb": rotary}

    def encode(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        latents = encoded_reference(pipe, pixels)
        batch, channels, height, width = latents.shape
        return packed_reference(pipe, latents, batch, channels, height, width), (height // 2, width // 2)
