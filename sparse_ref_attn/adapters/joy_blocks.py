"""JoyImage's transformers, for its two families: blocks whose text stands behind the pictures, and rotary tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cost import ModelShape
from ..functional import pack_rows, unpack_rows
from ..hooks.diffusers import Route
from ..hooks.instance import InstanceHook
from ..run import AttentionView
from ..selection import Reduced
from ..types import Reference, TokenLayout
from .base import Adapter, Found, Kwargs
from .depth import DepthCut
from .shortened import Shortened
from .text_behind import text_first, text_first_mask, with_text_first

__all__ = ["JOY_SIZE", "JoyAdapter", "Table", "kept_table", "turned"]

JOY_SIZE: Mapping[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 40, "theta": 10000}
"""As the repository of JoyAI-Image and diffusers' script of conversion have it."""

Table = tuple[Tensor, Tensor]


class JoyAdapter(Adapter):
    """The generation is the first picture of `shapes`, the references are the others."""

    streams: ClassVar[Mapping[str, str]] = {
        r"condition_embedder\.(time_embedder\..+|time_proj)": "item",
        r"condition_embedder\.text_embedder\..+": "text",
        r"double_blocks\.\d+\.(attn\.img_attn_(qkv|proj)|img_mlp\..+)": "image",
        r"double_blocks\.\d+\.(attn\.txt_attn_(qkv|proj)|txt_mlp\..+)": "text",
        r"proj_out": "output",
    }
    stacks: ClassVar[Mapping[str, str]] = {"double_blocks": "double"}

    def shapes(self, kwargs: Kwargs) -> list[tuple[int, int, int]] | None:
        """Frames, height and width in tokens of the generation and of each reference; None where they are not known."""
        raise NotImplementedError

    def layout_key(self, kwargs: Kwargs) -> object:
        return str(self.shapes(kwargs))

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

    def view(self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionView | None:
        q, k, v = (text_first(x, layout.text) for x in (q, k, v))
        return super().view(layout, q, k, v, text_first_mask(mask, layout.text))

    def ordered(self, attend: Route, text: int) -> Route:
        return with_text_first(attend, text)

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
