"""LTX-2 with references or keyframes: ``LTX2VideoTransformer3DModel``, order generation | keyframes | references.

Each latent frame of a reference counts as one reference. The video looks at itself; text and sound stand apart, in
attention of their own, and the sound looks at every row of the video. Times are by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Found, Kwargs
from ..adapters.depth import DepthCut
from ..adapters.masks import reduce_rows
from ..adapters.pipeline_facts import PipelineFacts
from ..adapters.position_ids import references_from_ids
from ..adapters.published_size import PublishedSize
from ..adapters.row_arguments import by_token, take_rows
from ..errors import UnsupportedModelError
from ..functional import pack_rows, unpack_rows
from ..hooks.diffusers import AttentionSite, attention_sites
from ..hooks.instance import InstanceHook
from ..selection import Reduced
from ..types import TokenLayout

__all__ = ["FAMILY", "LTX2Adapter"]

IN_CONTEXT = PipelineFacts("diffusers.LTX2InContextPipeline", references=(0, None), edits=False, packed=4)
CONDITION = PipelineFacts("diffusers.LTX2ConditionPipeline", references=(0, None), edits=False, packed=4)

_MASK = "video_self_attention_mask"
_HIDDEN = -10000.0  # what the model adds to the scores where its mask is 0

# Modulation is by row, but that of the looks between video and sound, which follows the other's time.
_STREAMS = {
    r"transformer_blocks\.\d+\.(audio_attn1|audio_attn2|audio_ff)\..+": "beside",
    r"transformer_blocks\.\d+\.(audio_to_video_attn\.to_[kv]|video_to_audio_attn\.to_(q|out\.0|gate_logits))": "beside",
    r"transformer_blocks\.\d+\.attn2\.to_[kv]": "text",
    r"transformer_blocks\.\d+\..+": "image",
    r"audio_.+|av_cross_attn_audio_.+": "beside",
    r"av_cross_attn_video_.+|prompt_adaln\..+": "item",
    r"caption_projection\..+": "text",
    r"proj_in|time_embed\..+": "image",
    r"proj_out": "output",
}


class LTX2Adapter(Adapter):
    """References are the rows behind those of the generation's frames; ``video_coords`` says where each one lies."""

    name = "LTX-2"
    classes = ("diffusers.models.transformers.transformer_ltx2.LTX2VideoTransformer3DModel",)
    needs = ("video_coords", "num_frames", "height", "width", _MASK)
    pipelines = (IN_CONTEXT, CONDITION)
    published: ClassVar[Mapping[str, PublishedSize]] = {"ltx-2": PublishedSize(IN_CONTEXT, 18.9)}
    streams = _STREAMS
    stacks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "double"}
    attention = "attn1"
    attention_arguments = "attention_kwargs"
    text_apart = True
    guided_apart = True
    parts = ("norm_out", "proj_out", "config.patch_size", "config.patch_size_t")

    def check(self, transformer: nn.Module) -> None:
        super().check(transformer)
        config: Any = transformer.config
        if (config.patch_size, config.patch_size_t) != (1, 1):
            raise UnsupportedModelError(
                "the LTX-2 adapter counts a row for each cell of the latents (patch_size and patch_size_t 1), got "
                f"{config.patch_size} and {config.patch_size_t}"
            )

    def layout_key(self, kwargs: Kwargs) -> object:
        return *_frames(kwargs), kwargs.get("video_keyframes_mask") is None

    def find(self, kwargs: Kwargs) -> Found | None:
        coords, rows, sides = kwargs.get("video_coords"), kwargs["hidden_states"].shape[1], _frames(kwargs)
        if None in sides or kwargs.get("video_keyframes_mask") is not None:
            return None  # keyframes that are generated too are no references
        generation = prod(sides)
        if rows == generation:
            return (0, rows), ()
        if coords is None or coords.ndim != 4 or rows < generation:
            return None
        cells = coords[0, 1:, generation:, 0].float().cpu().T  # (R, 2): y and x
        down, right = cells.diff(dim=0).unbind(1)
        begins = (down < 0) | ((down == 0) & (right <= 0))  # a frame, where the cells do not go on
        ids = torch.zeros(rows, 3)
        ids[:generation, 1] = torch.arange(generation)
        ids[generation:, 0] = 1 + torch.cat([torch.zeros(1), begins.cumsum(0)])
        ids[generation:, 1:] = cells
        return references_from_ids(ids, generation)

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        """Frames stand one above another."""
        frames, height, width = _frames(kwargs)
        return frames * height, width

    def mask(self, kwargs: Kwargs) -> Tensor | None:
        """What the model adds to the scores, (B, 1, rows, rows)."""
        seen = kwargs.get(_MASK)
        return None if seen is None else (1 - seen.to(kwargs["hidden_states"].dtype))[:, None] * _HIDDEN

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        named = {"hidden_states": 1, "video_coords": 2, _MASK: 1, **by_token(kwargs, layout.rows)}
        return take_rows(take_rows(kwargs, named, rows), {_MASK: 2}, rows)

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        """A new token has its reference's time and frame, and is as large as its first token."""
        x, coords, times = kwargs["hidden_states"], kwargs["video_coords"], by_token(kwargs, layout.rows)
        at = layout.generation[1]
        tokens, places, firsts = [x[:, :at]], [coords[:, :, :at]], [*range(at)]
        for reference, new in zip(layout.references, reduced, strict=True):
            first = coords[:, :, reference.start : reference.start + 1]
            moved = first.repeat(1, 1, new.positions.shape[0], 1)
            size = first[:, 1:, :, 1:] - first[:, 1:, :, :1]
            moved[:, 1:] += size * new.positions.to(moved).T[None, :, :, None]
            tokens.append(new.tokens.to(x.dtype))
            places.append(moved)
            firsts += [reference.start] * new.positions.shape[0]
        out = {**kwargs, "hidden_states": torch.cat(tokens, 1), "video_coords": torch.cat(places, 2)}
        if kwargs.get(_MASK) is not None:
            out[_MASK] = reduce_rows(kwargs[_MASK], x.shape[0], layout, reduced)
        return out | {name: kwargs[name][:, firsts] for name in times}

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        kwargs = {**kwargs, "hidden_states": cut.rows(kwargs["hidden_states"])}
        for name in ("temb", "temb_ca_scale_shift", "temb_ca_gate"):
            if kwargs[name].shape[1] == cut.full:
                kwargs[name] = cut.table(kwargs[name], axis=1)
        for name in ("video_rotary_emb", "ca_video_rotary_emb"):
            kwargs[name] = tuple(cut.table(x, axis=x.ndim - 2) for x in kwargs[name])
        if kwargs.get("self_attention_mask") is not None:
            kwargs["self_attention_mask"] = cut.table(cut.table(kwargs["self_attention_mask"], axis=1), axis=2)
        return kwargs

    def depth_hooks(self, transformer: nn.Module, cut: DepthCut) -> list[Callable[[], None]]:
        """The times of the output are those of every row."""
        norm, last = transformer.norm_out, transformer.proj_out
        assert isinstance(norm, nn.Module)
        assert isinstance(last, nn.Module)

        def whole(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return None if cut.kept is None else unpack_rows(output, cut.kept, cut.full)

        def kept(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return None if cut.kept is None else pack_rows(output, cut.kept)

        return [m.register_forward_hook(InstanceHook(m, hook)).remove for m, hook in ((norm, whole), (last, kept))]

    def onlookers(self, transformer: nn.Module) -> list[AttentionSite]:
        """The sound."""
        return attention_sites([(block.module.video_to_audio_attn, "other") for block in self.blocks(transformer)])  # type: ignore[arg-type]

    def idle(self, kwargs: Kwargs) -> frozenset[int]:
        """Blocks of spatio-temporal guidance, unless it is of some items alone."""
        of_all = kwargs.get("perturbation_mask") is None
        return frozenset(kwargs.get("spatio_temporal_guidance_blocks") or ()) if of_all else frozenset()


def _frames(kwargs: Kwargs) -> tuple[Any, Any, Any]:
    """Frames, height and width of the generation in rows."""
    return kwargs.get("num_frames"), kwargs.get("height"), kwargs.get("width")


FAMILY = LTX2Adapter()
