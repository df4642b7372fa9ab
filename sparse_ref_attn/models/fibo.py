"""Bria's FIBO-Edit: ``BriaFiboTransformer2DModel``, order text | generation | references.

Each block takes half of its text channels from a layer of the text encoder, by the text's own rows. Guidance runs both
prompts in one call, and the padding of the shorter is masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ..adapters.base import Adapter, Found, Kwargs
from ..adapters.depth import DepthCut
from ..adapters.flux_blocks import FLUX_BLOCKS
from ..adapters.masks import cut_in_block
from ..adapters.pipeline_facts import PipelineFacts
from ..adapters.position_ids import grid_of_ids, place_by_ids, references_from_ids
from ..adapters.published_size import PublishedSize
from ..adapters.row_arguments import take_rows
from ..selection import Reduced
from ..types import TokenLayout

__all__ = ["FAMILY", "FiboAdapter"]

EDIT = PipelineFacts("diffusers.BriaFiboEditPipeline", references=(0, None), edits=False)

_CONFIG = {"in_channels": 48, "num_layers": 8, "num_single_layers": 38}


class FiboAdapter(Adapter):
    """References have frames 1, 2, ... in ``img_ids``."""

    name = "FIBO-Edit"
    classes = ("diffusers.models.transformers.transformer_bria_fibo.BriaFiboTransformer2DModel",)
    needs = ("img_ids", "txt_ids", "text_encoder_layers")
    pipelines = (EDIT,)
    published: ClassVar[Mapping[str, PublishedSize]] = {"fibo-edit": PublishedSize(EDIT, 8.3, _CONFIG)}
    streams: ClassVar[Mapping[str, str]] = {
        r"x_embedder": "image",
        r"context_embedder|caption_projection\..+": "text",
        r"(time|guidance)_embed\..+": "item",
        **FLUX_BLOCKS,
    }
    stacks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "double", "single_transformer_blocks": "single"}

    def find(self, kwargs: Kwargs) -> Found | None:
        return None if kwargs.get("img_ids") is None else references_from_ids(kwargs["img_ids"])

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        return grid_of_ids(kwargs["img_ids"], layout)

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        return take_rows(self.cut_mask(kwargs, layout, rows), {"hidden_states": 1, "img_ids": -2}, rows)

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        return place_by_ids(self.reduce_mask(kwargs, layout, reduced), layout, reduced)

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        """The single blocks get text and image as one stream."""
        x, (cos, sin) = kwargs["hidden_states"], kwargs["image_rotary_emb"]
        kwargs = cut_in_block(kwargs, "joint_attention_kwargs", x.shape[0], cos.shape[0], cut)
        rotary = cut.table(cos, joint=True), cut.table(sin, joint=True)
        return {**kwargs, "hidden_states": cut.rows(x, joint=kind == "single"), "image_rotary_emb": rotary}


FAMILY = FiboAdapter()
