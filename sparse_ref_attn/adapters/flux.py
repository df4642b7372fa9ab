"""FLUX.1 Kontext, and its inpainting: ``FluxTransformer2DModel``, order text | generation | reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..selection import Reduced
from ..types import TokenLayout
from .base import Adapter, Found, Kwargs, references_from_ids, take_rows
from .seams import AttentionSite, attention_sites
from .streams import FLUX_STREAMS

__all__ = ["FluxAdapter", "place_by_ids"]


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
    streams = FLUX_STREAMS

    def find(self, kwargs: Kwargs) -> Found | None:
        if kwargs.get("img_ids") is None or kwargs.get("controlnet_block_samples") is not None:
            return None
        return references_from_ids(kwargs["img_ids"])

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        return take_rows(kwargs, {"hidden_states": 1, "img_ids": -2}, rows)

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        return place_by_ids(kwargs, layout, reduced)

    def sites(self, transformer: nn.Module) -> list[AttentionSite]:
        blocks = [(b.attn, "double") for b in transformer.transformer_blocks]  # type: ignore[union-attr]
        blocks += [(b.attn, "single") for b in transformer.single_transformer_blocks]  # type: ignore[union-attr]
        return attention_sites(blocks)

    def encode(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        latents = pipe._encode_vae_image(image=pixels, generator=None)
        batch, channels, height, width = latents.shape
        return pipe._pack_latents(latents, batch, channels, height, width), (height // 2, width // 2)
