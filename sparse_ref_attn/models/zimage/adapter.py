"""Z-Image-Omni: ``ZImageTransformer2DModel``, whose forward cuts lists of pictures into tokens and pads each picture.

The image stream is references | generation. The model refines the pictures by themselves first, then has joint rows
words | pictures | features of the references, each with their padding. The padding and the features count as text.
Guidance runs both prompts in one call, and the words of each item have a length of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.weak import WeakIdKeyDictionary

from ...adapters.base import Adapter, Found, Kwargs
from ...adapters.depth import DepthCut
from ...adapters.pipeline_facts import PipelineFacts
from ...adapters.published_size import PublishedSize
from ...adapters.shortened import Shortened
from ...adapters.token_form import FORM
from ...cost import ModelShape
from ...errors import IncompatibleError
from ...functional import pack_rows
from ...selection import Reduced
from ...types import Reference, TokenLayout
from .kept import depth_hooks, kept_tokens
from .parts import Parts

__all__ = ["ZImageAdapter"]

EDIT = PipelineFacts("diffusers.ZImageOmniPipeline", references=(0, None), shaped_by=-1)

# What refines the features runs on them alone, and is as large as what refines the words.
_STREAMS = {
    r"all_x_embedder\..+|noise_refiner\.\d+\.(attention|feed_forward)\..+": "image",
    r"cap_embedder\..+|context_refiner\..+": "text",
    r"siglip_(embedder|refiner)\..+": "twin",
    r"t_embedder\..+|.+\.adaLN_modulation\..+": "reference_item",
    r"layers\..+|all_final_layer\..+": "joint",
}


class ZImageAdapter(Adapter):
    """The generation is the last picture of each item; references are at time 1, clean."""

    name = "Z-Image-Omni"
    classes = ("diffusers.models.transformers.transformer_z_image.ZImageTransformer2DModel",)
    pipelines = (EDIT,)
    published: ClassVar[Mapping[str, PublishedSize]] = {
        "z-image-omni": PublishedSize(EDIT, 6.5, {"siglip_feat_dim": 1152}, assumed=True),
    }
    needs = ("t", "siglip_feats", "image_noise_mask", "patch_size", "f_patch_size")
    streams = _STREAMS
    stacks: ClassVar[Mapping[str, str]] = {"noise_refiner": "image", "layers": "single"}
    attention = "attention"
    parts = (
        "patchify_and_embed_omni", "unpatchify", "rope_embedder", "config.axes_dims",
        "config.rope_theta", "_build_unified_sequence", "all_final_layer", "siglip_embedder",
    )  # fmt: skip
    tokens = "x"
    text_tokens = "cap_feats"

    def __init__(self) -> None:
        self._texts: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
        """Pictures become rows (B, tokens, D), captions one text (B, rows, D), and time falls."""
        kwargs = super().bind(transformer, args, kwargs)
        if not isinstance(kwargs.get("x"), list):
            return kwargs
        side, features = kwargs.get("patch_size", 2), kwargs.get("siglip_feats")
        seen = features if transformer.siglip_embedder is not None and features and features[0] is not None else None
        parts = Parts.of(kwargs["x"], kwargs["cap_feats"], seen, (kwargs.get("f_patch_size", 1), side, side))
        if parts is None:
            return {**kwargs, "x": None}
        text, time = self._joined(parts.captions), 1 - kwargs["t"]
        return {**kwargs, "x": parts.tokens(), "cap_feats": text, "timestep": time, FORM: parts}

    def _joined(self, captions: list[Any]) -> Tensor:
        """The captions of a call as one tensor, the same one as long as the pipeline holds them."""
        items = [item if isinstance(item, list) else [item] for item in captions]
        flat = [part for item in items for part in item]
        known = self._texts.setdefault(flat[0], [])
        known[:] = [each for each in known if all(held() is not None for held in each[0])]
        for parts, text in known:
            if len(parts) == len(flat) and all(held() is part for held, part in zip(parts, flat, strict=True)):
                return text
        text = pad_sequence([torch.cat(item).detach() for item in items], batch_first=True)
        known.append(([weakref.ref(part) for part in flat], text))
        return text

    def layout_key(self, kwargs: Kwargs) -> object:
        return kwargs[FORM].grids

    def find(self, kwargs: Kwargs) -> Found | None:
        parts: Parts = kwargs[FORM]
        ends = [0, *accumulate(parts.sizes)]
        references = tuple(
            Reference(start, size, grid[1:] if grid[0] == 1 else None)
            for start, size, grid in zip(ends, parts.sizes[:-1], parts.grids, strict=False)
        )
        return (ends[-2], parts.sizes[-1]), references

    def layout(self, kwargs: Kwargs, found: Found) -> TokenLayout:
        if found[1] and kwargs.get("controlnet_block_samples"):
            raise IncompatibleError(
                "a ControlNet of Z-Image adds a row to each joint row of a block, which dropped or stored references "
                "leave: it must run without references, got controlnet_block_samples beside them"
            )
        return super().layout(kwargs, found)

    def text_rows(self, kwargs: Kwargs) -> int:
        """Words, features and all padding."""
        parts: Parts = kwargs[FORM]
        return parts.joint - sum(parts.sizes)

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        raise IncompatibleError(
            'per="tile" ranks joint rows, and the first blocks of Z-Image see the pictures without the words: use '
            'per="run"'
        )

    def mask(self, kwargs: Kwargs) -> Any:
        """The model reads none."""
        return None

    def order(self, kwargs: Kwargs, layout: TokenLayout, kind: str) -> Tensor | None:
        return kwargs[FORM].order(kind, kwargs["x"].device)

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        return {**kwargs, "x": pack_rows(kwargs["x"], rows)}

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        x = kwargs["x"]
        tokens = [r.tokens.to(x.dtype) for r in reduced]
        return {**kwargs, "x": torch.cat([*tokens, x[:, layout.generation[0] :]], 1)}

    def restore(self, output: Any, rows: Tensor, size: int) -> Any:
        """The output is the generation of each item, as a picture."""
        return output

    def hooks(self, transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
        return kept_tokens(transformer, shortened)

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        names = ("x", "attn_mask", "freqs_cis", "noise_mask")
        rows = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return {**kwargs, **{name: cut.joint(x, kind) for name, x in rows.items()}}

    def depth_hooks(self, transformer: nn.Module, cut: DepthCut) -> list[Callable[[], None]]:
        return depth_hooks(transformer, cut)

    def exactness(self, transformer: nn.Module) -> str:
        return "fixed time"

    def shape(self, transformer: nn.Module) -> ModelShape:
        config: Any = transformer.config
        return ModelShape.from_module(
            transformer,
            self.streams,
            attention_layers=config.n_layers + config.n_refiner_layers,
            heads=config.n_heads,
            head_dim=config.dim // config.n_heads,
            reference_timestep=True,
            blocks=[block.name for block in self.blocks(transformer)],
        )

    def encode(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        device, dtype = pixels.device, pipe.transformer.dtype
        (latents,) = pipe.prepare_image_latents(list(pixels.split(1)), 1, device, dtype)
        parts = Parts.of([[each] for each in latents], [], None, (1, 2, 2))
        assert parts is not None
        return parts.tokens(), parts.grids[0][1:]
