"""FLUX.1 Kontext, and its inpainting: ``FluxTransformer2DModel``, order text | generation | reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.alone import ReferencesAlone
from ..adapters.base import Adapter, Found, Kwargs
from ..adapters.collate import flat_ids, pad, same, stack
from ..adapters.depth import DepthCut
from ..adapters.flux_blocks import FLUX_BLOCKS
from ..adapters.masks import cut_in_block
from ..adapters.pipeline_facts import PipelineFacts
from ..adapters.position_ids import grid_of_ids, place_by_ids, references_from_ids
from ..adapters.published_size import PublishedSize
from ..adapters.row_arguments import by_token, take_rows
from ..adapters.training_hooks import TrainingHooks
from ..hooks.diffusers import encoded_reference, internal, packed_reference
from ..selection import Reduced
from ..types import TokenLayout

__all__ = ["FAMILY", "FluxAdapter"]

_IDS = {"img_ids": "hidden_states", "txt_ids": "encoder_hidden_states"}

_STREAMS = {
    r"x_embedder": "image",
    r"context_embedder": "text",
    r"time_text_embed\..+": "item",
    **FLUX_BLOCKS,
}


class KontextTraining(TrainingHooks):
    """The target has frame 0 and the reference frame 1; the prompt is read by CLIP and T5."""

    max_text = 512

    def arguments(
        self, pipe: Any, grids: Sequence[tuple[int, int]], prompts: list[str], references: Tensor, text_tokens: int
    ) -> Kwargs:
        text, pooled, text_ids = pipe.encode_prompt(prompt=prompts, prompt_2=None, max_sequence_length=text_tokens)
        ids = [
            torch.cartesian_prod(torch.tensor([float(frame)]), torch.arange(float(rows)), torch.arange(float(columns)))
            for frame, (rows, columns) in enumerate(grids)
        ]
        return {
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "img_ids": torch.cat(ids).to(text.device),
            "txt_ids": text_ids,
        }


KONTEXT = PipelineFacts(
    "diffusers.FluxKontextPipeline",
    references=(0, 1),
    area="max_area",
    training=KontextTraining(),
)
KONTEXT_INPAINT = PipelineFacts(
    "diffusers.FluxKontextInpaintPipeline",
    references=(1, 1),
    edits=False,
    area="max_area",
)


class FluxAdapter(Adapter):
    """Kontext's reference tokens have frame 1 in ``img_ids``; any frame other than the first row's counts."""

    name = "FLUX.1 Kontext"
    classes = ("diffusers.models.transformers.transformer_flux.FluxTransformer2DModel",)
    needs = ("img_ids", "txt_ids")
    pipelines = (KONTEXT, KONTEXT_INPAINT)
    published: ClassVar[Mapping[str, PublishedSize]] = {
        "kontext": PublishedSize(KONTEXT, 11.9, {"guidance_embeds": True})
    }
    streams = _STREAMS
    stacks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
    per_item = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
    parts = ("pos_embed",)
    processors = ("FluxAttnProcessor",)
    alone = ReferencesAlone()

    def find(self, kwargs: Kwargs) -> Found | None:
        if kwargs.get("img_ids") is None or kwargs.get("controlnet_block_samples") is not None:
            return None
        return references_from_ids(kwargs["img_ids"])

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        return grid_of_ids(kwargs["img_ids"], layout)

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        axes = {"hidden_states": 1, "img_ids": -2, **by_token(kwargs, layout.rows)}
        return take_rows(self.cut_mask(kwargs, layout, rows), axes, rows)

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
        return internal("models.embeddings", "apply_rotary_emb")(x, tuple(rotary), sequence_dim=1)

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        x, (cos, sin) = kwargs["hidden_states"], kwargs["image_rotary_emb"]
        kwargs = cut_in_block(kwargs, "joint_attention_kwargs", x.shape[0], cos.shape[0], cut)
        rotary = cut.table(cos, joint=True), cut.table(sin, joint=True)
        return {**kwargs, "hidden_states": cut.rows(x), "image_rotary_emb": rotary}

    def encode(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        latents = encoded_reference(pipe, pixels)
        batch, channels, height, width = latents.shape
        return packed_reference(pipe, latents, batch, channels, height, width), (height // 2, width // 2)


FAMILY = FluxAdapter()
