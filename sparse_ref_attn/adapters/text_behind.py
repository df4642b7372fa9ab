"""Joint attention whose text rows stand behind those of the image stream, as the library expects them: before."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..hooks.diffusers import Attention, Route

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

    def turned(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
        given = text_first_mask(mask, text)
        user = _turned(own, q.shape[1], given, text)
        out = attend(i, text_first(q, text), text_first(k, text), text_first(v, text), given, user)
        return out.roll(-text, 1)

    return turned


def _turned(own: Attention, rows: int, mask: Tensor | None, text: int) -> Callable[..., Tensor]:
    def user(k: Tensor | None = None, v: Tensor | None = None, given: Tensor | None = mask) -> Tensor:
        if k is None:
            return text_first(own(), text)
        if given is not None and given.shape[-2] == rows:  # its queries are those of the caller's order
            given = given.roll(-text, -2)
        return text_first(own(k, v, given), text)

    return user
