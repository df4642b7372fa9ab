"""Qwen-Image-Edit, Edit-Plus and the 2511 form, and Qwen-Image-Layered: ``QwenImageTransformer2DModel``.

Order text | generation | references, told by ``img_shapes`` instead of position ids. The model
gets shapes that count the kept tokens; its position embedding gets the true ones, and the kept
rows of its output are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...adapters.base import Adapter, Found, Kwargs
from ...adapters.collate import pad, same, stack
from ...adapters.depth import DepthCut
from ...adapters.pipeline_facts import PipelineFacts
from ...adapters.published_size import PublishedSize
from ...adapters.row_arguments import by_token, take_rows, unpadded
from ...adapters.shortened import Shortened
from ...cost import ModelShape
from ...errors import LayoutError, UnsupportedModelError
from ...functional import pack_rows
from ...hooks.diffusers import encoded_reference, internal, packed_reference
from ...hooks.instance import InstanceHook
from ...selection import Reduced
from ...types import Reference, TokenLayout
from .alone import QwenReferencesAlone

__all__ = ["QwenImageAdapter", "frequencies"]

EDIT = PipelineFacts("diffusers.QwenImageEditPipeline", references=(1, 1))
EDIT_PLUS = PipelineFacts("diffusers.QwenImageEditPlusPipeline", references=(1, None), shaped_by=-1)
INPAINT = PipelineFacts("diffusers.QwenImageEditInpaintPipeline", references=(1, 1), edits=False)
LAYERED = PipelineFacts("diffusers.QwenImageLayeredPipeline", references=(1, 1), edits=False)

_LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}
_ROPES = ("QwenEmbedRope", "QwenEmbedLayer3DRope")

# With zero_cond_t the references have timestep 0: the timestep embedding and the image modulation run twice an item.
_STREAMS = {
    r"img_in": "image",
    r"txt_in": "text",
    r"time_text_embed\..+": "reference_item",
    r"transformer_blocks\.\d+\.img_mod\.1": "reference_item",
    r"transformer_blocks\.\d+\.txt_mod\.1": "item",
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_qkv|to_out\.0)": "image",
    r"transformer_blocks\.\d+\.img_mlp\..+": "image",
    r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_added_qkv|to_add_out)": "text",
    r"transformer_blocks\.\d+\.txt_mlp\..+": "text",
    r"norm_out\.linear": "item",
    r"proj_out": "output",
}


class QwenImageAdapter(Adapter):
    """The generation is the first of ``img_shapes``, the references are the others; of a model of layers the reference
    is the last, and the layers before it are the generation."""

    name = "Qwen-Image-Edit"
    classes = ("diffusers.models.transformers.transformer_qwenimage.QwenImageTransformer2DModel",)
    needs = ("img_shapes",)
    pipelines = (EDIT, EDIT_PLUS, INPAINT, LAYERED)
    published: ClassVar[Mapping[str, PublishedSize]] = {
        "qwen-image-edit": PublishedSize(EDIT, 20.4),
        "qwen-image-edit-2511": PublishedSize(EDIT_PLUS, 20.4, {"zero_cond_t": True}),
        "qwen-image-layered": PublishedSize(LAYERED, 20.4, _LAYERED),
    }
    streams = _STREAMS
    stacks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "double"}
    attention_arguments = "attention_kwargs"
    per_item = (
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "timestep",
        "guidance",
        "img_shapes",
    )
    processors = ("QwenDoubleStreamAttnProcessor2_0",)
    alone = QwenReferencesAlone()
    parts = ("pos_embed", "pos_embed.axes_dim", "pos_embed.theta", "pos_embed.scale_rope", "pos_embed.rope_params")

    def check(self, transformer: nn.Module) -> None:
        if hasattr(transformer, "pos_embed") and type(transformer.pos_embed).__name__ not in _ROPES:
            raise UnsupportedModelError(
                f"the Qwen-Image-Edit adapter needs the model's {' or '.join(_ROPES)} position embedding, got "
                f"{type(transformer.pos_embed).__name__}"
            )
        super().check(transformer)

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
        """`additional_t_cond` tells a model of layers from the others, which read none; a block is given none."""
        kwargs = super().bind(transformer, args, kwargs)
        if not hasattr(transformer, "pos_embed"):
            return kwargs
        layered = type(transformer.pos_embed).__name__ == _ROPES[1]
        if layered and kwargs.get("additional_t_cond") is None:
            raise LayoutError("a transformer of layers (use_layer3d_rope) must be given additional_t_cond, got None")
        return kwargs if layered or "additional_t_cond" not in kwargs else {**kwargs, "additional_t_cond": None}

    def layout_key(self, kwargs: Kwargs) -> object:
        return str(kwargs.get("img_shapes"))

    def find(self, kwargs: Kwargs) -> Found | None:
        shapes = kwargs.get("img_shapes")
        if not shapes or kwargs.get("controlnet_block_samples") is not None:
            return None
        items = [[tuple(s) for s in (item if isinstance(item, list) else [item])] for item in shapes]
        if any(item != items[0] for item in items):
            return None
        layers, others = _split(items[0], kwargs)
        at = length = sum(map(prod, layers))
        references = []
        for frames, height, width in others:
            rows = frames * height * width
            references.append(Reference(at, rows, (height, width) if frames == 1 else None))
            at += rows
        if at != kwargs["hidden_states"].shape[1]:
            return None
        return (0, length), tuple(references)

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        """Layers stand one above another."""
        shape = kwargs["img_shapes"][0]
        layers, _ = _split(shape if isinstance(shape, list) else [shape], kwargs)
        frames, height, width = layers[0]
        return (len(layers) * height, width) if frames == 1 and {*map(tuple, layers)} == {tuple(layers[0])} else None

    def layout(self, kwargs: Kwargs, found: Found) -> TokenLayout:
        why = self._foreign_mask(kwargs)
        if why is not None:
            raise LayoutError(why)
        return super().layout(kwargs, found)

    def _foreign_mask(self, kwargs: Kwargs) -> str | None:
        if self.mask(kwargs) is None:
            return None
        return (
            "Qwen-Image's attention makes its mask of encoder_hidden_states_mask (the pipeline's prompt_embeds_mask) "
            "and takes no other, got an attention_mask in attention_kwargs"
        )

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        return self._count(take_rows(kwargs, {"hidden_states": 1, **by_token(kwargs, layout.rows)}, rows), layout)

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        x = kwargs["hidden_states"]
        tokens = [r.tokens.to(x.dtype) for r in reduced]
        return self._count({**kwargs, "hidden_states": torch.cat([x[:, : layout.generation[1]], *tokens], 1)}, layout)

    def _count(self, kwargs: Kwargs, layout: TokenLayout) -> Kwargs:
        kept = kwargs["hidden_states"].shape[1] - layout.generation[1]
        kwargs["img_shapes"] = [[*_split(item, kwargs)[0], (1, 1, kept)] for item in kwargs["img_shapes"]]
        return kwargs

    def hooks(self, transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
        pos_embed = transformer.pos_embed
        assert isinstance(pos_embed, nn.Module)

        def true_shapes(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
            call = shortened()
            if call is None:
                return None
            shapes = call.kwargs["img_shapes"]
            return ((shapes, *args[1:]), kwargs) if args else (args, {**kwargs, "video_fhw": shapes})

        def kept_positions(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            call = shortened()
            if call is None:
                return None
            image, text = output
            if call.reduced is None:
                return pack_rows(image, call.rows, 0), text
            layers, shapes = _split(call.kwargs["img_shapes"][0], call.kwargs)
            frames = range(1, len(shapes) + 1) if call.kwargs.get("additional_t_cond") is None else [-1]
            moved = [
                frequencies(module, frame, shape, r.positions).to(image.device)
                for frame, shape, r in zip(frames, shapes, call.reduced, strict=True)
            ]
            return torch.cat([image[: sum(map(prod, layers))], *moved]), text

        return [
            pos_embed.register_forward_pre_hook(InstanceHook(pos_embed, true_shapes), with_kwargs=True).remove,
            pos_embed.register_forward_hook(InstanceHook(pos_embed, kept_positions)).remove,
        ]

    def cannot_join(self, kwargs: Kwargs) -> str | None:
        named = ("controlnet_block_samples", "additional_t_cond")
        refused = (f"{name} cannot be padded" for name in named if kwargs.get(name) is not None)
        rows = kwargs["hidden_states"].shape[1]
        return next(refused, None) or unpadded(kwargs, rows) or self._foreign_mask(kwargs)

    def join(self, items: Sequence[Kwargs], shared_time: bool | None = None) -> Kwargs:
        own = {name: stack(items, name) for name in ("timestep", "guidance")}
        rows = {name: pad(items, name) for name in ("hidden_states", "encoder_hidden_states")}
        # Shapes that count the rows, for models that modulate references apart; `rotary` has the true ones.
        shapes = [[item["img_shapes"][0][0], *_filler(rows["hidden_states"].shape[1], item)] for item in items]
        return {
            **same(items, self.per_item),
            **own,
            **rows,
            "encoder_hidden_states_mask": None,
            "img_shapes": shapes,
        }

    def keys(self, kwargs: Kwargs) -> Tensor | None:
        batch, rows = kwargs["hidden_states"].shape[:2]
        mask = kwargs.get("encoder_hidden_states_mask")
        return None if mask is None else torch.cat([mask.bool(), mask.new_ones(batch, rows, dtype=torch.bool)], 1)

    def key_masks(self, items: Sequence[Kwargs]) -> list[Tensor | None]:
        return [self._text_keys(item) for item in items]

    def _text_keys(self, item: Kwargs) -> Tensor | None:
        mask, (text, rows) = (
            item.get("encoder_hidden_states_mask"),
            (self.text_rows(item), item["hidden_states"].shape[1]),
        )
        if mask is None:
            return None
        if tuple(mask.shape) != (1, text):
            raise LayoutError(
                f"encoder_hidden_states_mask must be (B, text), an entry for each of an item's {text} text rows, got "
                f"{tuple(mask.shape)}"
            )
        return torch.cat([mask[0].bool(), mask.new_ones(rows, dtype=torch.bool)])

    def rotary(self, transformer: nn.Module, kwargs: Kwargs) -> tuple[Tensor, ...]:
        text, device = kwargs["encoder_hidden_states"].shape[1], kwargs["hidden_states"].device
        image, words = transformer.pos_embed(kwargs["img_shapes"], max_txt_seq_len=text, device=device)  # type: ignore[operator]
        return (torch.cat([words, image]),)

    def rotate(self, rotary: Sequence[Tensor], x: Tensor) -> Tensor:
        turn = internal("models.transformers.transformer_qwenimage", "apply_rotary_emb_qwen")
        return turn(x, *rotary, use_real=False)

    def joined_hooks(self, transformer: nn.Module, running: Callable[[], Any]) -> list[Callable[[], None]]:
        pos_embed = transformer.pos_embed
        assert isinstance(pos_embed, nn.Module)

        def unused(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
            """The model's own tables are not used in a joined call: the smallest will do."""
            call, shapes = running(), args[0] if args else kwargs["video_fhw"]
            if call is None or shapes != call.kwargs["img_shapes"]:
                return None
            return (([[(1, 1, 1)]], *args[1:]), kwargs) if args else (args, {**kwargs, "video_fhw": [[(1, 1, 1)]]})

        return [pos_embed.register_forward_pre_hook(InstanceHook(pos_embed, unused), with_kwargs=True).remove]

    def exactness(self, transformer: nn.Module) -> str:
        return "fixed time" if getattr(transformer, "zero_cond_t", False) else super().exactness(transformer)

    def shape(self, transformer: nn.Module) -> ModelShape:
        return replace(super().shape(transformer), reference_timestep=bool(getattr(transformer, "zero_cond_t", False)))

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        image, text = kwargs["image_rotary_emb"]
        kwargs = {**kwargs, "hidden_states": cut.rows(kwargs["hidden_states"])}
        if kwargs.get("modulate_index") is not None:
            kwargs["modulate_index"] = cut.table(kwargs["modulate_index"], axis=1)
        return kwargs | {"image_rotary_emb": (cut.table(image), text)}

    def encode(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        latents = encoded_reference(pipe, pixels[:, :, None])
        batch, channels, _, height, width = latents.shape
        return packed_reference(pipe, latents, batch, channels, height, width), (height // 2, width // 2)


def _split(shapes: Sequence[Any], kwargs: Kwargs) -> tuple[Sequence[Any], Sequence[Any]]:
    """The generation's shapes and the references' in one item of ``img_shapes``."""
    at = 1 if kwargs.get("additional_t_cond") is None else max(1, len(shapes) - 1)
    return shapes[:at], shapes[at:]


def _filler(rows: int, item: Kwargs) -> list[tuple[int, int, int]]:
    """What an item's image stream has beyond its generation, as one shape."""
    return [(1, 1, rows - prod(item["img_shapes"][0][0]))]


def frequencies(pos_embed: Any, frame: int, shape: Sequence[int], positions: Tensor) -> Tensor:
    """Rotations (K, C/2) complex at fractional cells (y, x) of a grid centred as Qwen-Image centres it."""
    if shape[0] != 1:
        raise LayoutError(f"a reference must have one frame to be placed, got {tuple(shape)}")
    parts = [torch.full_like(positions[:, 0], frame)]
    for axis in (0, 1):
        size = shape[1 + axis]
        parts.append(positions[:, axis] - (size - size // 2 if pos_embed.scale_rope else 0))
    dims, theta = pos_embed.axes_dim, pos_embed.theta
    return torch.cat([pos_embed.rope_params(p.cpu(), d, theta) for p, d in zip(parts, dims, strict=True)], 1)
