"""JoyImage-Edit-Plus: ``JoyImageEditPlusTransformer3DModel``, order generation | references, then the text.

Latents come as patches, a row each, and positions are made in a method of the model from the pictures' sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Found, Kwargs
from ..adapters.depth import DepthCut
from ..adapters.pipeline_facts import PipelineFacts
from ..adapters.published_size import PublishedSize
from ..adapters.shortened import Shortened
from ..adapters.text_behind import text_first, text_first_mask, with_text_first
from ..adapters.token_form import FORM, token_form_hooks
from ..cost import ModelShape
from ..functional import pack_rows, unpack_rows
from ..hooks.diffusers import Route
from ..hooks.instance import InstanceHook
from ..hooks.instance_method import InstanceMethod
from ..run import AttentionView
from ..selection import Reduced
from ..types import Reference, TokenLayout

__all__ = ["FAMILY", "JOY_SIZE", "JoyImageEditPlusAdapter", "kept_table", "turned"]

EDIT_PLUS = PipelineFacts("diffusers.JoyImageEditPlusPipeline", references=(0, None), edits=False, shaped_by=-1)

JOY_SIZE: Mapping[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 40, "theta": 10000}
"""As the repository of JoyAI-Image and diffusers' script of conversion have it."""

_STREAMS: Mapping[str, str] = {
    r"condition_embedder\.(time_embedder\..+|time_proj)": "item",
    r"condition_embedder\.text_embedder\..+": "text",
    r"double_blocks\.\d+\.(attn\.img_attn_(qkv|proj)|img_mlp\..+)": "image",
    r"double_blocks\.\d+\.(attn\.txt_attn_(qkv|proj)|txt_mlp\..+)": "text",
    r"proj_out": "output",
}
_POSITIONS = "_get_rotary_pos_embed_for_range"

Table = tuple[Tensor, Tensor]


class JoyImageEditPlusAdapter(Adapter):
    """The generation is the first of a sample's ``shape_list``, the references are the others."""

    name = "JoyImage-Edit-Plus"
    classes: ClassVar[tuple[str, ...]] = (
        "diffusers.models.transformers.transformer_joyimage_edit_plus.JoyImageEditPlusTransformer3DModel",
    )
    needs: ClassVar[tuple[str, ...]] = ("shape_list",)
    pipelines: ClassVar[tuple[PipelineFacts, ...]] = (EDIT_PLUS,)
    published: ClassVar[Mapping[str, PublishedSize]] = {"joyimage-edit-plus": PublishedSize(EDIT_PLUS, 16.3, JOY_SIZE)}
    streams = _STREAMS
    stacks: ClassVar[Mapping[str, str]] = {"double_blocks": "double"}
    parts: ClassVar[tuple[str, ...]] = (_POSITIONS, "img_in", "proj_out", "config.patch_size", "config.rope_dim_list")

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
        """Patches (B, rows, C, pt, ph, pw) become rows (B, rows, D)."""
        kwargs = super().bind(transformer, args, kwargs)
        x = kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.ndim != 6:
            return kwargs
        return {**kwargs, "hidden_states": x.flatten(2), FORM: tuple(x.shape[2:])}

    def layout_key(self, kwargs: Kwargs) -> object:
        return str(self.shapes(kwargs))

    def shapes(self, kwargs: Kwargs) -> list[tuple[int, int, int]] | None:
        """Frames, height and width in tokens of the generation and of each reference; None where samples differ."""
        samples = [[tuple(shape) for shape in sample] for sample in kwargs.get("shape_list") or []]
        return samples[0] if samples and all(sample == samples[0] for sample in samples) else None

    def find(self, kwargs: Kwargs) -> Found | None:
        shapes = self.shapes(kwargs)
        if not shapes:
            return None
        ends = list(accumulate(map(prod, shapes)))
        references = tuple(
            Reference(start, prod(shape), shape[1:] if shape[0] == 1 else None)
            for start, shape in zip(ends, shapes[1:], strict=False)
        )
        return (0, ends[0]), references

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        frames, height, width = (self.shapes(kwargs) or [(0, 0, 0)])[0]
        return (height, width) if frames == 1 else None

    def keys(self, kwargs: Kwargs) -> Tensor | None:
        batch, rows = kwargs["hidden_states"].shape[:2]
        mask = kwargs.get("encoder_hidden_states_mask")
        return None if mask is None else torch.cat([mask.bool(), mask.new_ones(batch, rows, dtype=torch.bool)], 1)

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        return {**kwargs, "hidden_states": pack_rows(kwargs["hidden_states"], rows)}

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        x = kwargs["hidden_states"]
        tokens = [r.tokens.to(x.dtype) for r in reduced]
        return {**kwargs, "hidden_states": torch.cat([x[:, : layout.generation[1]], *tokens], 1)}

    def hooks(self, transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
        def kept_positions(own: Callable[..., Table], start: tuple[int, int, int], stop: tuple[int, int, int]) -> Table:
            """The model asks for the table of one picture after another: the first answer is that of all."""
            call = shortened()
            if call is None:
                return own(start, stop)
            shapes = self.shapes(call.kwargs)
            assert shapes is not None
            frames = [0, *accumulate(shape[0] for shape in shapes)]
            parts = [own((at, 0, 0), (at + t, h, w)) for at, (t, h, w) in zip(frames, shapes, strict=False)]
            table = kept_table(parts, call, partial(turned, transformer.config), frames[1:])
            return table if start[0] == 0 else (table[0][:0], table[1][:0])

        forms = token_form_hooks(
            transformer,
            "hidden_states",
            latents=lambda x, form: x.unflatten(2, form),
            tokens=lambda x, form: x.flatten(2),
            whole=lambda x, form: x.unflatten(2, (-1, *form[1:])),
        )
        return [InstanceMethod(transformer, _POSITIONS, kept_positions).remove, *forms]

    def view(self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionView | None:
        q, k, v = (text_first(x, layout.text) for x in (q, k, v))
        return super().view(layout, q, k, v, text_first_mask(mask, layout.text))

    def ordered(self, attend: Route, text: int) -> Route:
        return with_text_first(attend, text)

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        kwargs = {**kwargs, "hidden_states": cut.rows(kwargs["hidden_states"])}
        cos, sin = kwargs["image_rotary_emb"]
        kwargs["image_rotary_emb"] = cut.table(cos, axis=1), cut.table(sin, axis=1)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            image = mask.shape[-1] - kwargs["encoder_hidden_states"].shape[1]
            kept = cut.rows(mask[..., :image], axis=3)
            kwargs["attention_mask"] = torch.cat([kept, mask[..., image:]], -1)
        return kwargs

    def depth_hooks(self, transformer: nn.Module, cut: DepthCut) -> list[Callable[[], None]]:
        """What the model makes of its last rows must be as many as its first."""
        last: nn.Module = transformer.proj_out  # type: ignore[assignment]

        def whole(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return None if cut.kept is None else unpack_rows(output, cut.kept, cut.full)

        return [last.register_forward_hook(InstanceHook(last, whole)).remove]

    def shape(self, transformer: nn.Module) -> ModelShape:
        config: Any = transformer.config
        embedder: Any = transformer.img_in
        shape = ModelShape.from_module(
            transformer,
            self.streams,
            attention_layers=config.num_layers,
            head_dim=config.hidden_size // config.num_attention_heads,
            blocks=[block.name for block in self.blocks(transformer)],
        )
        patch = embedder.weight.numel()
        return replace(shape, image=shape.image + patch, leading=tuple(n + patch for n in shape.leading))


def kept_table(
    parts: Sequence[Table], call: Shortened, placed: Callable[[int, Tensor], Table], frames: Sequence[int]
) -> Table:
    """The table (rows, C) of a shortened call, of those of its pictures as they are."""
    if call.reduced is None:
        cos, sin = (torch.cat(tables) for tables in zip(*parts, strict=True))
        return pack_rows(cos.to(call.rows.device), call.rows, 0), pack_rows(sin.to(call.rows.device), call.rows, 0)
    moved = [placed(frame, r.positions) for frame, r in zip(frames, call.reduced, strict=False)]
    cos, sin = (torch.cat([x.to(call.rows.device) for x in tables]) for tables in zip(parts[0], *moved, strict=True))
    return cos, sin


def turned(config: Any, frame: int, positions: Tensor) -> Table:
    """Cosine and sine (K, C) at fractional cells (y, x) of a picture, as JoyImage turns whole ones."""
    axes = [torch.full_like(positions[:, 0], frame), positions[:, 0], positions[:, 1]]
    angles = []
    for at, size in zip(axes, config.rope_dim_list, strict=True):
        steps = torch.arange(0, size, 2, dtype=torch.float32, device=at.device)[: size // 2]
        angles.append(torch.outer(at.float(), 1.0 / (config.theta ** (steps / size))))
    whole = torch.cat(angles, 1)
    return whole.cos().repeat_interleave(2, 1), whole.sin().repeat_interleave(2, 1)


FAMILY = JoyImageEditPlusAdapter()
