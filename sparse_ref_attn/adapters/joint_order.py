"""Joint attention whose rows lie in another order, of each item its own, than the library has them: text first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hooks.diffusers import Attention, Route
from ..run import AttentionView
from ..types import TokenLayout

if TYPE_CHECKING:
    from .base import Adapter

__all__ = ["in_order", "order_of_kept", "ordered_view", "pick", "places_of_kept", "reordered", "unpick"]

Move = Callable[[Tensor, int], Tensor]


def pick(x: Tensor, order: Tensor, axis: int = 1) -> Tensor:
    """Rows ``order[b]`` of each item b along an axis of x (B, ...), order (B or 1, rows); one row stands for all.

    Examples
    --------
    >>> pick(torch.tensor([[5, 6, 7], [1, 2, 3]]), torch.tensor([[2, 0], [0, 1]]))
    tensor([[7, 5],
            [1, 2]])
    """
    if x.shape[axis] == 1:
        return x
    if order.shape[0] == 1:
        return x.index_select(axis, order[0].to(x.device))
    shape = [1] * x.ndim
    shape[0], shape[axis] = order.shape
    return torch.take_along_dim(x.expand(order.shape[0], *x.shape[1:]), order.to(x.device).view(shape), axis)


def unpick(x: Tensor, order: Tensor, rows: int) -> Tensor:
    """What `pick` of (B, rows, ...) gave, back in its places; zero elsewhere.

    Examples
    --------
    >>> unpick(torch.tensor([[7, 5]]), torch.tensor([[2, 0]]), 3)
    tensor([[5, 0, 7]])
    """
    index = order.to(x.device).expand(x.shape[0], -1).view(*x.shape[:2], *[1] * (x.ndim - 2)).expand_as(x)
    return x.new_zeros(x.shape[0], rows, *x.shape[2:]).scatter(1, index, x)


def order_of_kept(order: Tensor, rows: Tensor, before: int) -> Tensor:
    """The order of a call with `rows` (ascending) of an image stream that had `before` rows, and all of its text.

    Examples
    --------
    >>> order_of_kept(torch.tensor([[3, 0, 1, 2]]), torch.tensor([1, 2]), 3)  # the text row lies behind
    tensor([[2, 0, 1]])
    """
    return places_of_kept(order, rows, before).argsort(1).argsort(1)


def places_of_kept(order: Tensor, rows: Tensor, before: int) -> Tensor:
    """Where a call with all `before` rows of the image stream has its text and `rows` of that stream, in this order.

    Examples
    --------
    >>> places_of_kept(torch.tensor([[3, 0, 1, 2]]), torch.tensor([1, 2]), 3)
    tensor([[3, 1, 2]])
    """
    text = order.shape[1] - before
    return torch.cat([order[:, :text], order[:, text + rows.to(order.device)]], 1)


def in_order(attend: Route, order: Tensor) -> Route:
    """A route over rows as the model has them, where `attend` is given, and gives, rows in `order` (B or 1, S)."""
    places = order.argsort(1)
    return reordered(attend, lambda x, axis: pick(x, order, axis), lambda x, axis: pick(x, places, axis))


def reordered(attend: Route, there: Move, back: Move) -> Route:
    """A route over rows as the model has them, where `attend` is given, and gives, what ``there(x, axis)`` makes.

    Parameters
    ----------
    attend : callable
        See `hooks.diffusers.routed_attention`.
    there, back : callable
        Move the rows along an axis of 1 or S of them.
    """

    def moved(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
        given = None if mask is None else there(there(mask, -2), -1)

        def user(keys: Tensor | None = None, values: Tensor | None = None, masked: Tensor | None = given) -> Tensor:
            if keys is None:
                return there(own(), 1)
            if masked is not None and masked.shape[-2] == q.shape[1]:  # its queries are those of the caller's order
                masked = back(masked, -2)
            return there(own(keys, values, masked), 1)

        return back(attend(i, there(q, 1), there(k, 1), there(v, 1), given, user), 1)

    return moved


def ordered_view(
    adapter: Adapter, order: Tensor | None, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask: Any
) -> AttentionView | None:
    """The adapter's view of attention whose rows lie in `order` (see `Adapter.order`)."""
    if order is None or not q.shape[1] == k.shape[1] == order.shape[1]:
        return adapter.view(layout, q, k, v, mask)
    q, k, v = (pick(x, order) for x in (q, k, v))
    mask = None if mask is None else pick(pick(mask, order, -2), order, -1)
    return adapter.view(replace(layout, text=order.shape[1] - layout.rows), q, k, v, mask)
