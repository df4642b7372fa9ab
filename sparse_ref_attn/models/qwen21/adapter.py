"""Qwen-Image-2.1: ``QwenImage21Transformer2DModel``, whose references stand between the words of the prompt.

The image stream is references | generation. Joint attention has each reference in its slot among the words, then the
generation. The first step runs and keeps words and references, the others run the generation alone, which reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn

from ...adapters.base import Adapter, Found, Kwargs
from ...adapters.masks import viewed
from ...adapters.pipeline_facts import PipelineFacts
from ...adapters.published_size import PublishedSize
from ...adapters.shortened import Shortened
from ...cost import ModelShape
from ...errors import IncompatibleError
from ...hooks.diffusers import Tap
from ...run import AttentionView
from ...types import Reference, TokenLayout
from .cache import Qwen21CacheHooks
from .listening import heard_generation
from .slots import kept_positions

__all__ = ["Qwen21Adapter"]

EDIT = PipelineFacts("diffusers.QwenImage21Pipeline", references=(0, None), shaped_by=-1, packed=1)

_UNKEPT = (
    "Qwen-Image-2.1 reads a part of its references from the keys and values that it keeps of them, and a call must "
    "keep them, got one that does not: leave use_kv_cache=True in the pipeline's call, with a model of "
    "causal_condition; the call of a training script keeps none, and loses no tokens of them"
)


class Qwen21Adapter(Adapter):
    """The pictures of a call are those of ``img_shapes``, the generation last."""

    name = "Qwen-Image-2.1"
    classes = ("diffusers.models.transformers.transformer_qwenimage21.QwenImage21Transformer2DModel",)
    needs = ("img_shapes", "img_mask", "kv_cache", "kv_cache_mode")
    pipelines = (EDIT,)
    published: ClassVar[Mapping[str, PublishedSize]] = {"qwen-image-2.1": PublishedSize(EDIT, 7.1)}
    streams: ClassVar[Mapping[str, str]] = {
        r"img_in": "image",
        r"txt_in\..+": "text",
        r"time_text_embed\..+|modulation\.1|norm_out\.linear": "reference_item",
        r"transformer_blocks\..+": "joint",
        r"proj_out": "output",
    }
    stacks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "single"}
    attention_arguments = "attention_kwargs"
    parts = ("pos_embed", "config.causal_condition")
    cache = Qwen21CacheHooks()

    def layout_key(self, kwargs: Kwargs) -> object:
        return str(kwargs.get("img_shapes")), kwargs.get("kv_cache_mode")

    def find(self, kwargs: Kwargs) -> Found | None:
        shapes = kwargs.get("img_shapes")
        if not shapes or not shapes[0]:
            return None
        *pictures, generation = shapes[0]
        if pictures and kwargs.get("kv_cache") is None:
            raise IncompatibleError(_UNKEPT)
        starts = [0, *accumulate(map(prod, pictures))]
        references = tuple(
            Reference(start, prod(shape), shape[1:] if shape[0] == 1 else None)
            for start, shape in zip(starts, pictures, strict=False)
        )
        return (starts[-1], prod(generation)), references

    def layout(self, kwargs: Kwargs, found: Found) -> TokenLayout:
        layout = super().layout(kwargs, found)
        return replace(layout, places=self.cache.slots(kwargs).places) if layout.references else layout

    def text_rows(self, kwargs: Kwargs) -> int:
        """Words of the prompt, in which a picture has a slot for four tokens."""
        given, shapes = super().text_rows(kwargs), kwargs.get("img_shapes")
        return given - sum(map(prod, shapes[0][:-1])) // 4 if shapes else given

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        frames, height, width = kwargs["img_shapes"][0][-1]
        return (height, width) if frames == 1 else None

    def mask(self, kwargs: Kwargs) -> Any:
        """A caller's mask is of the prompt alone, and loses no row."""
        return None

    def cached(self, kwargs: Kwargs) -> bool:
        return kwargs.get("kv_cache_mode") == "cached" and len(kwargs["img_shapes"][0]) > 1

    def extracts(self, kwargs: Kwargs) -> bool:
        return kwargs.get("kv_cache_mode") == "extract"

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        raise IncompatibleError(f"{self.name}: {self.cache.whole}, and single tokens of them cannot be dropped there")

    def hooks(self, transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
        return kept_positions(transformer.pos_embed)  # type: ignore[arg-type]

    def view(self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionView | None:
        """The generation attends last, to everything; the pieces of the prompt before it are not asked."""
        if (q.shape[1], k.shape[1]) != (layout.generation[1], layout.text + layout.rows):
            return None
        items = layout.conditional or slice(None)
        seen = viewed(mask, q.shape[0], k.shape[1], {"generation": slice(None)}, items)
        return AttentionView(k[items], v[items], q[items], None, self.cache.spans(layout), **seen)

    def listen(self, transformer: nn.Module, tap: Tap) -> Any:
        return heard_generation(self.sites(transformer), tap)

    def check_depth(self, transformer: nn.Module) -> None:
        self.cache.check_depth(self.name)

    def shape(self, transformer: nn.Module) -> ModelShape:
        names = [block.name for block in self.blocks(transformer)]
        return ModelShape.from_module(transformer, self.streams, reference_timestep=True, blocks=names)
