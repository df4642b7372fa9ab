"""JoyImage-Edit: ``JoyImageEditTransformer3DModel``, order generation | reference, then the text.

The pictures are frames of one tensor, the generation the last of them, and the forward cuts them into tokens. A call
with fewer tokens gets them side by side, as one row of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn

from ..adapters.base import Kwargs
from ..adapters.depth import DepthCut
from ..adapters.joy_blocks import JOY_SIZE, JoyAdapter, kept_table, turned
from ..adapters.pipeline_facts import PipelineFacts
from ..adapters.published_size import PublishedSize
from ..adapters.shortened import Shortened
from ..adapters.token_form import FORM, token_form_hooks
from ..hooks.instance_method import InstanceMethod

__all__ = ["FAMILY", "JoyImageEditAdapter"]

EDIT = PipelineFacts("diffusers.JoyImageEditPipeline", references=(0, 1))

_POSITIONS = "get_rotary_pos_embed"


@dataclass(frozen=True)
class _Frames:
    """The latents of a call: n pictures (b, n, c, t, h, w), of which the model takes the last first.

    Parameters
    ----------
    shape : tuple of int
        Of the latents, without b.
    patch : tuple of int
        Of a token, (t, h, w).

    Examples
    --------
    >>> import torch
    >>> frames = _Frames((2, 1, 1, 2, 4), (1, 2, 2))
    >>> latents = torch.arange(16).view(1, 2, 1, 1, 2, 4)
    >>> frames.tokens(latents).tolist()
    [[[8, 9, 12, 13], [10, 11, 14, 15], [0, 1, 4, 5], [2, 3, 6, 7]]]
    >>> bool((frames.latents(frames.tokens(latents)) == latents).all())
    True
    >>> frames.latents(frames.tokens(latents)[:, 1:]).shape
    torch.Size([1, 1, 1, 2, 6])
    """

    shape: tuple[int, ...]
    patch: tuple[int, ...]

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Tokens of each picture, the generation first."""
        t, h, w = (size // side for size, side in zip(self.shape[-3:], self.patch, strict=True))
        return [(t, h, w)] * (self.shape[0] if len(self.shape) == 5 else 1)

    def tokens(self, x: Tensor) -> Tensor:
        """Rows (b, rows, D) of latents, or of a row of patches, as the model has them."""
        if x.ndim == 6:
            x = x.roll(1, 1).transpose(1, 2).flatten(2, 3)
        b, c, *sizes = x.shape
        t, h, w = (size // side for size, side in zip(sizes, self.patch, strict=True))
        pt, ph, pw = self.patch
        x = x.reshape(b, c, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return x.reshape(b, t * h * w, c * pt * ph * pw)

    def latents(self, x: Tensor) -> Tensor:
        """Latents of the rows of all pictures; of fewer the row of patches (b, c, pt, ph, rows * pw)."""
        b, (pt, ph, pw), grids = x.shape[0], self.patch, self.grids
        x = x.unflatten(2, (-1, pt, ph, pw))
        if x.shape[1] != sum(map(prod, grids)):
            return x.permute(0, 2, 3, 4, 1, 5).reshape(b, -1, pt, ph, x.shape[1] * pw)
        (t, h, w), n = grids[0], len(grids)
        x = x.unflatten(1, (n, t, h, w)).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
        x = x.reshape(b, n, -1, t * pt, h * ph, w * pw)
        return x.roll(-1, 1) if len(self.shape) == 5 else x[:, 0]


class JoyImageEditAdapter(JoyAdapter):
    """All pictures are of one size, and guidance runs its prompts in calls of their own."""

    name = "JoyImage-Edit"
    classes = ("diffusers.models.transformers.transformer_joyimage.JoyImageEditTransformer3DModel",)
    pipelines = (EDIT,)
    published: ClassVar[Mapping[str, PublishedSize]] = {"joyimage-edit": PublishedSize(EDIT, 16.3, JOY_SIZE)}
    parts = (_POSITIONS, "img_in", "proj_out", "config.patch_size", "config.rope_dim_list")

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
        """Latents become rows (B, rows, D)."""
        kwargs = super().bind(transformer, args, kwargs)
        x = kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.ndim not in (5, 6):
            return kwargs
        frames = _Frames(tuple(x.shape[1:]), tuple(transformer.config.patch_size))  # type: ignore[union-attr, arg-type]
        return {**kwargs, "hidden_states": frames.tokens(x), FORM: frames}

    def shapes(self, kwargs: Kwargs) -> list[tuple[int, int, int]] | None:
        return kwargs[FORM].grids if FORM in kwargs else None

    def hooks(self, transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
        def kept_positions(own: Callable[..., Any], vis_rope_size: list[int], txt_rope_size: int | None = None) -> Any:
            call = shortened()
            if call is None:
                return own(vis_rope_size, txt_rope_size)
            grids = call.kwargs[FORM].grids
            frames = [0, *accumulate(grid[0] for grid in grids)]
            image, text = own([frames[-1], *grids[0][1:]], txt_rope_size)
            parts = list(zip(*(table.split([prod(grid) for grid in grids]) for table in image), strict=True))
            return kept_table(parts, call, partial(turned, transformer.config), frames[1:]), text

        forms = token_form_hooks(
            transformer,
            "hidden_states",
            latents=lambda x, frames: frames.latents(x),
            tokens=lambda x, frames: frames.tokens(x),
            whole=lambda x, frames: frames.latents(x),
        )
        return [InstanceMethod(transformer, _POSITIONS, kept_positions).remove, *forms]

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        (cos, sin), text = kwargs["image_rotary_emb"]
        kwargs = {**kwargs, "hidden_states": cut.rows(kwargs["hidden_states"])}
        return kwargs | {"image_rotary_emb": ((cut.table(cos), cut.table(sin)), text)}


FAMILY = JoyImageEditAdapter()
