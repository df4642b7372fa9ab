"""JoyImage-Edit-Plus: ``JoyImageEditPlusTransformer3DModel``, order generation | references, then the text.

Latents come as patches, a row each, and positions are made in a method of the model from the pictures' sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import Kwargs
from ..adapters.depth import DepthCut
from ..adapters.joy_blocks import JOY_SIZE, JoyAdapter, Table, kept_table, turned
from ..adapters.pipeline_facts import PipelineFacts
from ..adapters.published_size import PublishedSize
from ..adapters.shortened import Shortened
from ..adapters.token_form import FORM, token_form_hooks
from ..hooks.instance_method import InstanceMethod

__all__ = ["FAMILY", "JoyImageEditPlusAdapter"]

EDIT_PLUS = PipelineFacts("diffusers.JoyImageEditPlusPipeline", references=(0, None), edits=False, shaped_by=-1)

_POSITIONS = "_get_rotary_pos_embed_for_range"


class JoyImageEditPlusAdapter(JoyAdapter):
    """The generation is the first of a sample's ``shape_list``, the references are the others."""

    name = "JoyImage-Edit-Plus"
    classes: ClassVar[tuple[str, ...]] = (
        "diffusers.models.transformers.transformer_joyimage_edit_plus.JoyImageEditPlusTransformer3DModel",
    )
    needs: ClassVar[tuple[str, ...]] = ("shape_list",)
    pipelines: ClassVar[tuple[PipelineFacts, ...]] = (EDIT_PLUS,)
    published: ClassVar[Mapping[str, PublishedSize]] = {"joyimage-edit-plus": PublishedSize(EDIT_PLUS, 16.3, JOY_SIZE)}
    parts: ClassVar[tuple[str, ...]] = (_POSITIONS, "img_in", "proj_out", "config.patch_size", "config.rope_dim_list")

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
        """Patches (B, rows, C, pt, ph, pw) become rows (B, rows, D)."""
        kwargs = super().bind(transformer, args, kwargs)
        x = kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.ndim != 6:
            return kwargs
        return {**kwargs, "hidden_states": x.flatten(2), FORM: tuple(x.shape[2:])}

    def shapes(self, kwargs: Kwargs) -> list[tuple[int, int, int]] | None:
        """Frames, height and width in tokens of the generation and of each reference; None where samples differ."""
        samples = [[tuple(shape) for shape in sample] for sample in kwargs.get("shape_list") or []]
        return samples[0] if samples and all(sample == samples[0] for sample in samples) else None

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


FAMILY = JoyImageEditPlusAdapter()
