"""LongCat-Image-Edit: ``LongCatImageTransformer2DModel``, order text | generation | reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.alone import ReferencesAlone
from ..adapters.base import Adapter, Found, Kwargs
from ..adapters.collate import flat_ids, pad, same, stack
from ..adapters.depth import DepthCut
from ..adapters.flux_blocks import FLUX_BLOCKS
from ..adapters.pipeline_facts import PipelineFacts
from ..adapters.position_ids import grid_of_ids, place_by_ids, references_from_ids
from ..adapters.published_size import PublishedSize
from ..adapters.row_arguments import take_rows
from ..adapters.training_hooks import TrainingHooks
from ..hooks.diffusers import encoded_reference, internal, packed_reference
from ..hooks.instance import InstanceHook
from ..selection import Reduced
from ..types import TokenLayout

__all__ = ["FAMILY", "LongCatAdapter"]

_IDS = {"img_ids": "hidden_states", "txt_ids": "encoder_hidden_states"}


class LongCatTraining(TrainingHooks):
    """Its text encoder sees the reference; pictures begin where the text ends, with frames 1 and 2."""

    max_text = 512

    def arguments(
        self, pipe: Any, grids: Sequence[tuple[int, int]], prompts: list[str], references: Tensor, text_tokens: int
    ) -> Kwargs:
        pixels = (references.float() * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        length, pipe.tokenizer_max_length = pipe.tokenizer_max_length, text_tokens
        try:
            encoded = [pipe.encode_prompt([prompt], picture) for prompt, picture in zip(prompts, pixels, strict=True)]
        finally:
            pipe.tokenizer_max_length = length
        text, first = torch.cat([embeds for embeds, _ in encoded]), encoded[0][0].shape[1]
        ids = [
            torch.cartesian_prod(torch.tensor([1.0 + i]), *(first + torch.arange(float(side)) for side in grid))
            for i, grid in enumerate(grids)
        ]
        return {"encoder_hidden_states": text, "txt_ids": encoded[0][1], "img_ids": torch.cat(ids).to(text.device)}


EDIT = PipelineFacts(
    "diffusers.LongCatImageEditPipeline",
    references=(1, 1),
    training=LongCatTraining(),
)


class LongCatAdapter(Adapter):
    """Pictures begin at the position where the text ends, with frames 1 and 2. The forward takes no mask."""

    name = "LongCat-Image-Edit"
    classes = ("diffusers.models.transformers.transformer_longcat_image.LongCatImageTransformer2DModel",)
    pipelines = (EDIT,)
    published: ClassVar[Mapping[str, PublishedSize]] = {
        "longcat-image-edit": PublishedSize(EDIT, 6.3, {"num_layers": 10, "num_single_layers": 20}),
    }
    needs = ("img_ids", "txt_ids")
    streams: ClassVar[Mapping[str, str]] = {
        r"x_embedder": "image",
        r"context_embedder": "text",
        r"time_embed\..+": "item",
        **FLUX_BLOCKS,
    }
    stacks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
    per_item = ("hidden_states", "encoder_hidden_states", "timestep")
    parts = ("pos_embed",)
    processors = ("LongCatImageAttnProcessor",)
    alone = ReferencesAlone()

    def find(self, kwargs: Kwargs) -> Found | None:
        return None if kwargs.get("img_ids") is None else references_from_ids(kwargs["img_ids"])

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        return grid_of_ids(kwargs["img_ids"], layout)

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        return take_rows(kwargs, {"hidden_states": 1, "img_ids": -2}, rows)

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        return place_by_ids(kwargs, layout, reduced)

    def cannot_join(self, kwargs: Kwargs) -> str | None:
        return None

    def join(self, items: Sequence[Kwargs], shared_time: bool | None = None) -> Kwargs:
        rows = {name: pad(items, name) for name in ("hidden_states", "encoder_hidden_states")}
        # The tables that the model makes of these are not used: `rotary` has each item's own.
        ids = {name: rows[of].new_zeros(rows[of].shape[1], 3) for name, of in _IDS.items()}
        return {**same(items, {*self.per_item, *_IDS}), "timestep": stack(items, "timestep"), **rows, **ids}

    def joined_hooks(self, transformer: nn.Module, running: Callable[[], Any]) -> list[Callable[[], None]]:
        """Its blocks hand arguments on to their attention, and its own forward has none for them."""
        name = self.attention_arguments

        def off(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
            return args, {key: value for key, value in kwargs.items() if key != name}

        def on(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
            return None if running() is None else (args, {**kwargs, name: running().kwargs[name]})

        hooked = [(transformer, off), *((block.module, on) for block in self.blocks(transformer))]
        return [m.register_forward_pre_hook(InstanceHook(m, hook), with_kwargs=True).remove for m, hook in hooked]

    def rotary(self, transformer: nn.Module, kwargs: Kwargs) -> tuple[Tensor, ...]:
        return transformer.pos_embed(torch.cat([flat_ids(kwargs["txt_ids"]), flat_ids(kwargs["img_ids"])]))  # type: ignore[operator]

    def rotate(self, rotary: Sequence[Tensor], x: Tensor) -> Tensor:
        return internal("models.embeddings", "apply_rotary_emb")(x, tuple(rotary), sequence_dim=1)

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        cos, sin = kwargs["image_rotary_emb"]
        rotary = cut.table(cos, joint=True), cut.table(sin, joint=True)
        return {**kwargs, "hidden_states": cut.rows(kwargs["hidden_states"]), "image_rotary_emb": rotary}

    def encode(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        latents = encoded_reference(pipe, pixels)
        batch, channels, height, width = latents.shape
        return packed_reference(pipe, latents, batch, channels, height, width), (height // 2, width // 2)


FAMILY = LongCatAdapter()
