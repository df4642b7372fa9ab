"""GLM-Image: ``GlmImageTransformer2DModel``, whose references run before the steps, each in a call of its own.

What they leave is a cache of keys and values, which the steps read in the order references | text | generation. The
forward cuts latents into tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...adapters.base import Adapter, Found, Kwargs
from ...adapters.pipeline_facts import PipelineFacts
from ...adapters.published_size import PublishedSize
from ...adapters.row_arguments import take_rows
from ...adapters.shortened import Shortened
from ...adapters.stream import own_rows
from ...adapters.token_form import FORM, token_form_hooks
from ...functional import pack_rows
from ...hooks.diffusers import Attention, Route
from ...hooks.instance import InstanceHook
from ...types import Reference, TokenLayout
from .cache import GlmCacheHooks, filled

__all__ = ["GlmImageAdapter"]

PIPELINE = PipelineFacts("diffusers.GlmImagePipeline", references=(0, None), edits=False)

_REFERENCES = "reference_latents"


@dataclass(frozen=True)
class _Cells:
    """Latents (B, C, H, W) cut into cells of `patch` x `patch`, a row each.

    Examples
    --------
    >>> import torch
    >>> cells = _Cells((1, 2, 4), 2)
    >>> cells.tokens(torch.arange(8).view(1, 1, 2, 4)).tolist()
    [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    >>> cells.latents(cells.tokens(torch.arange(8).view(1, 1, 2, 4))).flatten().tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    shape: tuple[int, ...]
    patch: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.shape[1] // self.patch, self.shape[2] // self.patch

    def tokens(self, x: Tensor) -> Tensor:
        (h, w), p = self.grid, self.patch
        return x.reshape(x.shape[0], -1, h, p, w, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def latents(self, x: Tensor) -> Tensor:
        (h, w), p = self.grid, self.patch
        return x.reshape(x.shape[0], h, w, -1, p, p).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class GlmImageAdapter(Adapter):
    """A call that reads the cache is told of the references' latents, which were noted when they ran."""

    name = "GLM-Image"
    classes = ("diffusers.models.transformers.transformer_glm_image.GlmImageTransformer2DModel",)
    references = _REFERENCES
    needs = ("prior_token_id", "kv_caches")
    pipelines = (PIPELINE,)
    published: ClassVar[Mapping[str, PublishedSize]] = {
        "glm-image": PublishedSize(PIPELINE, 6.9, {"num_attention_heads": 32, "attention_head_dim": 128})
    }
    streams: ClassVar[Mapping[str, str]] = {
        r"image_projector\.proj|prior_projector\..+": "image",
        r"glyph_projector\..+": "text",
        r"time_condition_embed\..+|transformer_blocks\.\d+\.norm1\.linear|norm_out\.linear": "item",
        r"transformer_blocks\.\d+\.(attn1|ff)\..+": "joint",
        r"proj_out": "output",
    }
    stacks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "double"}
    attention = "attn1"
    attention_arguments = "attention_kwargs"
    parts = ("config.patch_size", "image_projector", "prior_projector")
    cache = GlmCacheHooks()

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
        """Latents become rows (B, rows, D), and the references of a cache an argument of their own."""
        kwargs = super().bind(transformer, args, kwargs)
        x = kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.ndim != 4:
            return kwargs
        cells = _Cells(tuple(x.shape[1:]), int(transformer.config.patch_size))  # type: ignore[union-attr, arg-type]
        kwargs |= {"hidden_states": cells.tokens(x), FORM: cells}
        kept = self.cache.kept(kwargs["kv_caches"], x.shape[0]) if _reads(kwargs) else None
        return kwargs if kept is None else {**kwargs, _REFERENCES: kept.tokens}

    def cached(self, kwargs: Kwargs) -> bool:
        return _REFERENCES in kwargs

    def layout_key(self, kwargs: Kwargs) -> object:
        return self.cache.of_call(kwargs).grids if self.cached(kwargs) else _reads(kwargs)

    def find(self, kwargs: Kwargs) -> Found | None:
        at = rows = kwargs["hidden_states"].shape[1]
        if _reads(kwargs) and not self.cached(kwargs):
            return None
        found = []
        for height, width in self.cache.of_call(kwargs).grids if self.cached(kwargs) else ():
            found.append(Reference(at, height * width, (height, width)))
            at += height * width
        return (0, rows), tuple(found)

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        return kwargs[FORM].grid if FORM in kwargs else None

    def mask(self, kwargs: Kwargs) -> Any:
        """The model's own mask is of text and generation alone, and it fails beside a cache."""
        return None

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        """The same call with a cache of the kept tokens alone."""
        kept, own = own_rows(layout, rows), self.cache.of_call(kwargs).layers
        layers = [(pack_rows(k, kept), pack_rows(v, kept)) for k, v in (layer.get() for layer in own)]
        return self.cache.reading(take_rows(kwargs, {_REFERENCES: 1}, kept), filled(layers))

    def hooks(self, transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
            given = self.bind(module, args, kwargs)
            cache = given.get("kv_caches")
            if FORM in given and cache is not None and cache[0].mode == "write":
                self.cache.note(cache, given["hidden_states"].detach(), given[FORM].grid)

        forms = token_form_hooks(
            transformer,
            "hidden_states",
            latents=lambda x, cells: cells.latents(x),
            tokens=lambda x, cells: cells.tokens(x),
            whole=lambda x, cells: cells.latents(x),
            told=(_REFERENCES,),
        )
        hook = InstanceHook(transformer, note)
        return [transformer.register_forward_pre_hook(hook, with_kwargs=True).remove, *forms]

    def ordered(self, attend: Route, text: int) -> Route:
        """The references' keys, which stand before those of the text, last."""

        def last(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            references = k.shape[1] - q.shape[1]
            return attend(i, q, k.roll(-references, 1), v.roll(-references, 1), mask, own)

        return last

    def check_depth(self, transformer: nn.Module) -> None:
        self.cache.check_depth(self.name)


def _reads(kwargs: Kwargs) -> bool:
    """Whether a call attends to a cache with references in it."""
    cache = kwargs.get("kv_caches")
    return cache is not None and cache[0].mode == "read" and bool(cache[0].k_caches)
