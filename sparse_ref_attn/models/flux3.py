"""FLUX.3, a modular pipeline: ``Flux3Transformer2DModel``, whose references are an argument of their own.

Text, generation and references first run through blocks of their own, each looking at itself, then through joint
blocks in the order text | generation | references. The references and the text have timestep 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Found, Kwargs
from ..adapters.depth import DepthCut
from ..adapters.pipeline_facts import PipelineFacts
from ..adapters.position_ids import grid_of_ids, place_by_ids, references_from_ids
from ..adapters.published_size import PublishedSize
from ..adapters.row_arguments import take_rows
from ..adapters.stream import own_layout, own_rows
from ..cost import ModelShape
from ..selection import Reduced
from ..types import TokenLayout

__all__ = ["FAMILY", "Flux3Adapter"]

PIPELINE = PipelineFacts("diffusers.Flux3ModularPipeline", references=(0, None), edits=False, default_steps=50)

# Modulation is by row. What runs on the references alone is as large as what runs on the generation alone.
_STREAMS = {
    r"(x_embedders|early_stream_modulations|single_stream_modulations)\.image_cond(\..+)?": "twin",
    r"mode_blocks\.image_cond\..+": "twin",
    r"(x_embedders|early_stream_modulations|single_stream_modulations)\.image(\..+)?": "image",
    r"mode_blocks\.image\..+": "image",
    r"context_embedder|(early_stream_modulations|single_stream_modulations)\.txt\..+": "text",
    r"txt_mode_blocks\..+": "text",
    r"single_transformer_blocks\..+": "joint",
    r"timestep_embedder\..+": "reference_item",
    r"target_timestep_embedder\..+": "item",
    r"norm_out\.linear|proj_out": "output",
}


class Flux3Adapter(Adapter):
    """A reference has a negative last coordinate in ``image_cond_ids``, the generation 0 in ``img_ids``."""

    name = "FLUX.3"
    classes = ("diffusers.models.transformers.transformer_flux3.Flux3Transformer2DModel",)
    references = "image_cond_hidden_states"
    needs = ("img_ids", "image_cond_hidden_states", "image_cond_ids")
    pipelines = (PIPELINE,)
    published: ClassVar[Mapping[str, PublishedSize]] = {"flux3": PublishedSize(PIPELINE, 5.5, assumed=True)}
    streams = _STREAMS
    stacks: ClassVar[Mapping[str, str]] = {"single_transformer_blocks": "single"}
    attention_arguments = "attention_kwargs"
    parts = ("mode_blocks", "txt_mode_blocks")

    def find(self, kwargs: Kwargs) -> Found | None:
        ids, own = kwargs.get("img_ids"), kwargs.get("image_cond_ids")
        if ids is None:
            return None
        if own is None or kwargs.get(self.references) is None:
            return (0, ids.shape[-2]), ()
        return references_from_ids(torch.cat([ids, own], -2)[..., [3, 1, 2]], ids.shape[-2])

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        return grid_of_ids(kwargs["img_ids"], layout)

    def mask(self, kwargs: Kwargs) -> Any:
        """The model reads none."""
        return None

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        kept = own_rows(layout, rows)
        if not kept.shape[0]:
            return {**kwargs, "image_cond_hidden_states": None, "image_cond_ids": None}
        return take_rows(kwargs, {"image_cond_hidden_states": 1, "image_cond_ids": -2}, kept)

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        ids = kwargs["image_cond_ids"]
        unit = (ids[..., 1:2, 1:3] - ids[..., :1, 1:3]).abs().sum()  # of a step to the next cell
        cells = torch.cat([ids[..., :1], ids[..., 1:3] / unit, ids[..., 3:]], -1)
        own = {"hidden_states": kwargs["image_cond_hidden_states"], "img_ids": cells}
        placed = place_by_ids(own, own_layout(layout), reduced)
        ids = placed["img_ids"]
        ids = torch.cat([ids[..., :1], ids[..., 1:3] * unit, ids[..., 3:]], -1)
        return {**kwargs, "image_cond_hidden_states": placed["hidden_states"], "image_cond_ids": ids}

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        cos, sin = kwargs["image_rotary_emb"]
        return {
            **kwargs,
            "hidden_states": cut.rows(kwargs["hidden_states"]),
            "temb_mod": cut.table(kwargs["temb_mod"], axis=1),
            "image_rotary_emb": (cut.table(cos, joint=True), cut.table(sin, joint=True)),
        }

    def exactness(self, transformer: nn.Module) -> str:
        return "fixed time"

    def shape(self, transformer: nn.Module) -> ModelShape:
        return ModelShape.from_module(
            transformer,
            self.streams,
            attention_layers=len(transformer.single_transformer_blocks),  # type: ignore[arg-type]
            own_attention_layers=len(transformer.txt_mode_blocks),  # type: ignore[arg-type]
            output_rows="generation",
            reference_timestep=True,
            blocks=[block.name for block in self.blocks(transformer)],
        )


FAMILY = Flux3Adapter()
