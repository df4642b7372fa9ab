"""DiffSynth-Studio's FLUX.1 and Qwen-Image, whose layers are run by functions (`FunctionModel`)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import Adapter, FunctionModel, PlainAdapter, references_from_ids
from ...adapters.base import Found, Kwargs
from ...adapters.serving import check_arguments
from ...adapters.shortened import Shortened
from ...errors import UnsupportedModelError
from ...functional import pack_rows
from ...hooks.instance import InstanceHook
from ...types import Reference, TokenLayout

__all__ = ["FLUX_FUNCTION", "QWEN_FUNCTION", "QwenFunctionAdapter"]

Shape = tuple[int, int, int]


def _find_flux(kwargs: Kwargs) -> Found | None:
    """Prompts for parts of the picture make a mask of the sequence inside: such a call is not known."""
    ids, own = kwargs.get("image_ids"), kwargs.get("kontext_image_ids")
    if ids is None or kwargs.get("entity_prompt_emb") is not None:
        return None
    if own is None:
        return (0, ids.shape[1]), ()
    return references_from_ids(torch.cat([ids, own], 1), ids.shape[1])


FLUX_FUNCTION = PlainAdapter(
    tokens="image_ids",  # a row for each token of the latents, which the function cuts itself
    references="kontext_latents",
    reference_rows={"kontext_image_ids": 1},
    find=_find_flux,
    text="prompt_emb",
    attention=["double"] * 19 + ["single"] * 38,
    name="FLUX.1 (DiffSynth-Studio)",
)
"""Of ``model_fn_flux_image``, whose references stand apart as tokens."""


class QwenFunctionAdapter(Adapter):
    """Of ``model_fn_qwen_image``, which takes its references as pictures of latents and cuts them into tokens.

    The stream is made of the pictures once more (`bind`). A shorter call has all kept tokens as one picture two pixels
    high, so that the function counts them rightly, whatever it makes of the count; their positions are taken from those
    of the true pictures. Layers, a control net's context, prompts for parts of the picture and interpolated positions
    are not known.
    """

    name = "Qwen-Image-Edit (DiffSynth-Studio)"
    tokens = "image_tokens"
    text_tokens = "prompt_emb"
    attention_arguments = ""

    def check(self, transformer: nn.Module) -> None:
        function = transformer if isinstance(transformer, FunctionModel) else None
        if function is None or not isinstance(getattr(function.model, "pos_embed", None), nn.Module):
            raise UnsupportedModelError(
                f"the {self.name} adapter serves a FunctionModel of model_fn_qwen_image and its QwenImageDiT, got "
                f"{type(transformer).__name__}"
            )
        check_arguments(self, transformer, ["latents", "edit_latents"])

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
        """With the image stream, (B, rows, D), as the function makes it."""
        latents = kwargs.get("latents")
        if latents is None:
            return kwargs
        return {**kwargs, self.tokens: torch.cat([_tokens(x) for x in (latents, *_references(kwargs))], 1)}

    def layout_key(self, kwargs: Kwargs) -> object:
        return tuple(_shapes(kwargs))

    def find(self, kwargs: Kwargs) -> Found | None:
        unknown = ("layer_num", "layer_input_latents", "context_latents", "entity_prompt_emb")
        if any(kwargs.get(name) is not None for name in unknown) or kwargs.get("edit_rope_interpolation"):
            return None
        (_, height, width), *others = _shapes(kwargs)
        at, references = height * width, []
        for shape in others:
            references.append(Reference(at, prod(shape), shape[1:]))
            at += prod(shape)
        return (0, height * width), tuple(references)

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        return _shapes(kwargs)[0][1:]

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        kept = pack_rows(kwargs[self.tokens], rows)[:, layout.generation[1] :]
        kwargs = {name: value for name, value in kwargs.items() if name != self.tokens}
        return {**kwargs, "edit_latents": [_picture(kept)]}

    def hooks(self, transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
        assert isinstance(transformer, FunctionModel)
        pos_embed = transformer.model.pos_embed
        assert isinstance(pos_embed, nn.Module)

        def true_shapes(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            call = shortened()
            return None if call is None else (_shapes(call.kwargs), *args[1:])

        def kept_positions(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Any:
            call = shortened()
            return None if call is None else (pack_rows(output[0], call.rows, 0), output[1])

        return [
            pos_embed.register_forward_pre_hook(InstanceHook(pos_embed, true_shapes)).remove,
            pos_embed.register_forward_hook(InstanceHook(pos_embed, kept_positions)).remove,
        ]


QWEN_FUNCTION = QwenFunctionAdapter()


def _references(kwargs: Kwargs) -> list[Tensor]:
    given = kwargs.get("edit_latents")
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _shapes(kwargs: Kwargs) -> list[Shape]:
    """Frames, rows and columns of tokens, of the generation and of each reference."""
    return [(1, x.shape[2] // 2, x.shape[3] // 2) for x in (kwargs["latents"], *_references(kwargs))]


def _tokens(latents: Tensor) -> Tensor:
    """(B, C, 2 h, 2 w) -> (B, h w, 4 C), a token for each 2 x 2 pixels."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def _picture(tokens: Tensor) -> Tensor:
    """(B, K, 4 C) -> the latents (B, C, 2, 2 K) whose tokens they are, side by side."""
    batch, count, channels = tokens.shape
    cells = tokens.reshape(batch, 1, count, channels // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2, 2 * count)
