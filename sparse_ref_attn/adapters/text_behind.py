"""Joint attention whose text rows stand behind those of the image stream, as the library expects them: before."""

from __future__ import annotations

from torch import Tensor

from ..hooks.diffusers import Route
from .joint_order import reordered

__all__ = ["text_first", "text_first_mask", "with_text_first"]


def text_first(x: Tensor, text: int) -> Tensor:
    """Joint rows (B, S, ...) with their last `text` rows in front.

    Examples
    --------
    >>> import torch
    >>> text_first(torch.tensor([[1, 2, 3, 9]]), 1)
    tensor([[9, 1, 2, 3]])
    """
    return x.roll(text, 1)


def text_first_mask(mask: Tensor | None, text: int) -> Tensor | None:
    """As `text_first`, of a mask (B or 1, H or 1, S or 1, S or 1)."""
    return None if mask is None else mask.roll((text, text), (-2, -1))


def with_text_first(attend: Route, text: int) -> Route:
    """A route over rows with the text behind, where `attend` is given, and gives, rows with the text in front.

    Parameters
    ----------
    attend : callable
        See `hooks.diffusers.routed_attention`.
    text : int
        Text rows of the call.
    """
    return reordered(attend, lambda x, axis: x.roll(text, axis), lambda x, axis: x.roll(-text, axis))
