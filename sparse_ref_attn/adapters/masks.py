"""A caller's mask of joint attention: checked, cut to the rows that stay, and taken apart for the items of a batch.

It is read as diffusers and ``scaled_dot_product_attention`` read it, text rows first: bool (True may be attended to) or
added to the scores, of shape (B, S) for keys, or (..., B or 1, H or 1, S or 1, S), leading dimensions optional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import IncompatibleError, LayoutError
from ..selection import Reduced
from ..types import TokenLayout
from .depth import DepthCut

__all__ = [
    "MASK",
    "as_scores",
    "check_mask",
    "cut_in_block",
    "cut_rows",
    "item_keys",
    "joint_keys",
    "key_mask",
    "mask_in",
    "not_of_keys",
    "of_item",
    "reduce_rows",
    "viewed",
    "with_mask",
    "without_mask",
]

MASK = "attention_mask"
"""The entry of the attention's arguments that holds the mask."""

Kwargs = dict[str, Any]


def mask_in(kwargs: Mapping[str, Any], argument: str) -> Any:
    """The mask among a call's arguments: `argument` itself, or its entry ``attention_mask``; None without."""
    given = kwargs.get(argument)
    return given.get(MASK) if isinstance(given, Mapping) else given


def with_mask(kwargs: Kwargs, argument: str, mask: Tensor) -> Kwargs:
    """The arguments with another mask in the place of theirs."""
    given = kwargs[argument]
    return {**kwargs, argument: {**given, MASK: mask} if isinstance(given, Mapping) else mask}


def without_mask(kwargs: Kwargs, argument: str) -> Kwargs:
    """The arguments without a mask; attention arguments of which nothing is left are None."""
    given = kwargs.get(argument)
    if not isinstance(given, Mapping):
        return kwargs
    return {**kwargs, argument: {name: value for name, value in given.items() if name != MASK} or None}


def check_mask(mask: Any, batch: int, rows: int) -> None:
    """Raise where a mask is not one of `rows` joint rows, or is of a kind whose rows cannot be taken.

    Raises
    ------
    IncompatibleError
        If it is no tensor, such as a ``BlockMask``.
    LayoutError
        If its shape or dtype is not that of a mask of so many rows.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise IncompatibleError(
            f"an attention mask must be a tensor, so that its rows can leave with their tokens, got a "
            f"{type(mask).__name__}"
        )
    shape = tuple(mask.shape)
    fits = 1 <= mask.ndim <= 4 and shape[-1] in (1, rows)
    fits = fits and (mask.ndim < 2 or shape[-2] in (1, rows) or shape == (batch, rows))
    if not fits or (mask.ndim == 4 and shape[0] not in (1, batch)):
        raise LayoutError(
            f"an attention mask must be of the call's {rows} joint rows (text first) and {batch} items: (B, S), or "
            f"(B or 1, 1 or H, 1 or S, S), got {shape}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise LayoutError(f"an attention mask must be bool, or floating and added to the scores, got {mask.dtype}")


def cut_rows(mask: Tensor, batch: int, text: int, rows: Tensor, before: int) -> Tensor:
    """The mask of the text and of `rows` (ascending) of an image stream that had `before` rows.

    Examples
    --------
    >>> mask = torch.tensor([[True, True, False, False, True]])  # one text row, four of the image stream
    >>> cut_rows(mask, 1, 1, torch.tensor([0, 2, 3]), 4)
    tensor([[ True,  True, False,  True]])
    """
    check_mask(mask, batch, text + before)
    joint = torch.cat([torch.arange(text, device=rows.device), rows + text]).to(mask.device)
    mask = mask if mask.ndim == 2 and _by_item(mask, batch) else _collapsed(mask)
    for axis in _row_axes(mask, batch, text + before):
        mask = mask.index_select(axis, joint)
    return mask


def reduce_rows(mask: Tensor, batch: int, layout: TokenLayout, reduced: Sequence[Reduced]) -> Tensor:
    """The mask of a call whose references are new tokens: each has what all tokens of its reference have (syncs).

    Raises
    ------
    IncompatibleError
        If the mask tells tokens of one reference apart.
    """
    check_mask(mask, batch, layout.text + layout.rows)
    axes = _row_axes(mask, batch, layout.text + layout.rows)
    rows, at = [], 0
    for number, (reference, new) in enumerate(zip(layout.references, reduced, strict=True)):
        rows += [*range(at, reference.start), *[reference.start] * new.tokens.shape[1]]
        at = reference.start + reference.length
        for axis in axes:
            part = mask.narrow(axis, layout.text + reference.start, reference.length)
            if not bool((part == part.narrow(axis, 0, 1)).all()):
                raise IncompatibleError(
                    "where a reference's tokens are replaced by others, the attention mask must be the same for all "
                    f"of them, got one that tells the tokens of reference {number} apart: use a selector"
                )
    rows += range(at, layout.rows)
    joint = torch.tensor([*range(layout.text), *(layout.text + row for row in rows)], device=mask.device)
    for axis in axes:
        mask = mask.index_select(axis, joint)
    return mask


def cut_in_block(kwargs: Kwargs, argument: str, batch: int, rows: int, cut: DepthCut) -> Kwargs:
    """A block's arguments with the mask of the kept rows, of `rows` joint ones."""
    mask = mask_in(kwargs, argument)
    if mask is None:
        return kwargs
    for axis in _row_axes(mask, batch, rows):
        mask = cut.table(mask, axis, joint=True)
    return with_mask(kwargs, argument, mask)


def of_item(kwargs: Kwargs, argument: str, batch: int, item: int) -> Kwargs:
    """Arguments of one item of a batch with its own mask."""
    mask = mask_in(kwargs, argument)
    if not isinstance(mask, Tensor) or batch == 1 or not _by_item(mask, batch):
        return kwargs
    return with_mask(kwargs, argument, mask[item : item + 1])


def key_mask(mask: Tensor, batch: int, rows: int) -> Tensor | None:
    """The mask as (B, S) bool of the keys that may be attended to; None where it says more than that.

    Of a floating mask the values are looked at (a sync): 0 may be attended to, the dtype's lowest or less may not.

    Examples
    --------
    >>> key_mask(torch.tensor([0.0, -torch.inf, 0.0]).view(1, 1, 1, 3), 2, 3)
    tensor([[ True, False,  True],
            [ True, False,  True]])
    >>> key_mask(torch.eye(3, dtype=torch.bool), 1, 3) is None
    True
    """
    scores = as_scores(mask, batch)
    if scores.shape[1] > 1 or scores.shape[2] > 1:
        return None
    keys = scores[:, 0, 0]
    if keys.dtype != torch.bool:
        hidden = keys <= torch.finfo(keys.dtype).min / 2
        if not bool((hidden | (keys == 0)).all()):
            return None
        keys = ~hidden
    return keys.expand(batch, rows)


def item_keys(mask: Any, rows: int) -> Tensor | None:
    """As `key_mask` of a batch of one, (S,); None without a mask too."""
    if mask is None:
        return None
    check_mask(mask, 1, rows)
    keys = key_mask(mask, 1, rows)
    return None if keys is None else keys[0]


def joint_keys(mask: Any, batch: int, rows: int) -> Tensor | None:
    """As `key_mask`, of a mask that must not say more than that; None without one (may sync).

    Raises
    ------
    IncompatibleError
        If it does.
    """
    if mask is None:
        return None
    check_mask(mask, batch, rows)
    keys = key_mask(mask, batch, rows)
    if keys is None:
        raise IncompatibleError(
            "where each tile reads reference tokens of its own, an attention mask must be of keys, (B, S) or "
            f"(B, 1, 1, S), bool or 0 and -inf, got {tuple(mask.shape)} in {mask.dtype} that differs between rows "
            'or heads, or has other values: use per="run"'
        )
    return keys


def as_scores(mask: Tensor, batch: int) -> Tensor:
    """The mask as (B or 1, H or 1, N or 1, S or 1); an expanded axis of heads or queries is 1 again."""
    if mask.ndim == 2 and _by_item(mask, batch):
        mask = mask[:, None, None]
    return _collapsed(mask[(None,) * (4 - mask.ndim)])


def not_of_keys(mask: Any, batch: int, rows: int) -> str | None:
    """Why attention that knows masks of keys alone cannot honour this one, in words; None when it can (may sync)."""
    if mask is None:
        return None
    check_mask(mask, batch, rows)
    if key_mask(mask, batch, rows) is not None:
        return None
    return (
        "an attention mask must be of keys, (B, S) or (B, 1, 1, S), bool or 0 and -inf, for calls that run together: "
        f"their attention kernel has no other, got {tuple(mask.shape)} in {mask.dtype} that differs between rows or "
        "heads, or has other values"
    )


def viewed(mask: Tensor | None, batch: int, rows: int, queries: Mapping[str, slice], items: slice) -> dict[str, Any]:
    """What an `AttentionView` of `items` holds of a mask: ``key_mask``, or ``masks`` of each probe's rows (may sync).

    `queries` are the joint rows of each kind of probe.
    """
    if mask is None:
        return {}
    check_mask(mask, batch, rows)
    keys = key_mask(mask, batch, rows)
    if keys is not None:
        return {"key_mask": keys[items]}
    scores = as_scores(mask, batch)
    scores = scores if scores.shape[0] == 1 else scores[items]
    return {"masks": {name: scores[:, :, at] if scores.shape[2] > 1 else scores for name, at in queries.items()}}


def _collapsed(mask: Tensor) -> Tensor:
    """Of an expanded axis of queries or heads one entry: what is copied would not show that its entries are alike."""
    for axis in range(max(0, mask.ndim - 3), mask.ndim - 1):
        if mask.shape[axis] > 1 and mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask


def _by_item(mask: Tensor, batch: int) -> bool:
    """Whether the first axis counts the batch's items, as diffusers reads it."""
    return mask.ndim in (2, 4) and mask.shape[0] == batch


def _row_axes(mask: Tensor, batch: int, rows: int) -> list[int]:
    """The axes of the mask that count joint rows."""
    of_queries = mask.ndim > 1 and not (mask.ndim == 2 and _by_item(mask, batch))
    axes = [mask.ndim - 1, *([mask.ndim - 2] if of_queries else [])]
    return [axis for axis in axes if mask.shape[axis] == rows]
