"""A call on references alone: without text and generation, at a fixed time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import IncompatibleError
from ..types import TokenLayout
from . import masks
from .row_arguments import take_rows

if TYPE_CHECKING:
    from .base import Adapter

__all__ = ["NamedAlone", "ReferencesAlone", "check_alone", "references_alone"]

Kwargs = dict[str, Any]

_GUIDANCE = 1.0  # of references, in a model with an embedding of it
_IMAGE_PROMPTS = ("ip_adapter_image_embeds", "ip_hidden_states")


class ReferencesAlone:
    """How a family's references run by themselves: one subclass each where this one does not fit.

    Families with position ids run them without a row of text; a pooled prompt is zero, and guidance is 1.
    """

    def arguments(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor, timestep: float) -> Kwargs:
        """The arguments of a call on `rows` (ascending, of references) alone, at `timestep`."""
        kwargs = take_rows(kwargs, {"hidden_states": 1, "img_ids": -2}, rows)
        kwargs |= {
            "encoder_hidden_states": kwargs["encoder_hidden_states"][:, :0],
            "txt_ids": kwargs["txt_ids"][..., :0, :],
        }
        if kwargs.get("pooled_projections") is not None:
            kwargs["pooled_projections"] = torch.zeros_like(kwargs["pooled_projections"])
        return at_time(kwargs, timestep)

    def conditions(self, kwargs: Kwargs) -> str:
        """What else of a call, besides the references, their keys and values depend on, in words."""
        return ""


class NamedAlone(ReferencesAlone):
    """Says it by a function: ``arguments(kwargs, layout, rows, timestep)``."""

    def __init__(self, arguments: Callable[[Kwargs, TokenLayout, Tensor, float], Kwargs]) -> None:
        self._say = arguments

    def arguments(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor, timestep: float) -> Kwargs:
        return self._say(kwargs, layout, rows, timestep)


def at_time(kwargs: Kwargs, timestep: float) -> Kwargs:
    """The arguments at another time, and with the references' guidance."""
    kwargs = {**kwargs, "timestep": torch.full_like(kwargs["timestep"], timestep)}
    if kwargs.get("guidance") is not None:
        kwargs["guidance"] = torch.full_like(kwargs["guidance"], _GUIDANCE)
    return kwargs


def check_alone(adapter: Adapter) -> ReferencesAlone:
    """How a family's references run by themselves.

    Raises
    ------
    IncompatibleError
        If it has no way.
    """
    if adapter.alone is None:
        raise IncompatibleError(
            f"references can run by themselves where the adapter says how (alone), and that of {adapter.name} does not"
        )
    return adapter.alone


def references_alone(
    adapter: Adapter, kwargs: Kwargs, layout: TokenLayout, tokens: range, timestep: float
) -> tuple[Kwargs, Tensor]:
    """The arguments of a call on the reference `tokens` alone, and their rows in the image stream.

    Raises
    ------
    IncompatibleError
        If the family has no way, or the call's references cannot be told from what depends on its prompt.
    """
    alone, given = check_alone(adapter), kwargs.get(adapter.attention_arguments)
    prompts = [name for name in _IMAGE_PROMPTS if isinstance(given, dict) and given.get(name) is not None]
    if prompts:
        raise IncompatibleError(
            f"references that run by themselves must not see an image prompt, got {' and '.join(prompts)} (an "
            "IP-Adapter) in the call: unload it"
        )
    rows = layout.reference_rows(kwargs[adapter.tokens].device)[tokens.start : tokens.stop]
    mask, batch = adapter.mask(kwargs), kwargs[adapter.tokens].shape[0]
    bare = kwargs if mask is None else masks.without_mask(kwargs, adapter.attention_arguments)
    own = alone.arguments(bare, layout, rows, timestep)
    if mask is None:
        return own, rows
    keys = masks.key_mask(mask, batch, layout.text + layout.rows)
    if keys is None:
        raise IncompatibleError(
            "where references run by themselves, an attention mask must be of keys, (B, S) or (B, 1, 1, S), bool or 0 "
            f"and -inf, got {tuple(mask.shape)} in {mask.dtype} that differs between rows or heads, or has other values"
        )
    seen = keys[:, layout.text + rows]
    text = 0 if adapter.text_tokens is None else own[adapter.text_tokens].shape[1]
    seen = torch.cat([seen.new_ones(batch, text), seen], 1)[:, None, None]
    handed = own.get(adapter.attention_arguments) or ({} if isinstance(given, dict) else None)
    return masks.with_mask({**own, adapter.attention_arguments: handed}, adapter.attention_arguments, seen), rows
