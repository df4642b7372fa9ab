"""A caller's mask where reference keys are stored: the columns of the references, beside those of a call's own keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from ..types import TokenLayout
from .masks import as_scores, check_mask

__all__ = ["beside", "reference_columns"]


def reference_columns(mask: Tensor, batch: int, layout: TokenLayout) -> Tensor:
    """What text and generation rows may attend to of the references, (B or 1, H or 1, N or 1, R), tokens in order.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference
    >>> layout = TokenLayout(3, 1, (0, 2), (Reference(2, 1),))  # text, two of the generation, one of a reference
    >>> reference_columns(torch.tensor([[True, True, False, True]]), 1, layout)
    tensor([[[[True]]]])
    """
    check_mask(mask, batch, layout.text + layout.rows)
    scores, joint = as_scores(mask, batch), layout.text + layout.rows
    columns = layout.reference_rows(mask.device) + layout.text
    if scores.shape[3] == joint:
        scores = scores.index_select(3, columns)
    else:
        scores = scores.expand(*scores.shape[:3], len(columns))
    if scores.shape[2] == joint:
        first, length = layout.generation
        scores = torch.cat([scores[:, :, : layout.text], scores.narrow(2, layout.text + first, length)], 2)
    return scores


def beside(
    mask: Tensor | None, columns: Tensor | None, count: int, own: int, batch: int, before: bool
) -> Tensor | None:
    """The mask of a call's `own` keys with that of `count` stored ones beside them, on the side where those lie.

    `columns` (B or 1, H or 1, N or 1, count) is theirs; None: they may all be attended to. None without either.

    Examples
    --------
    >>> beside(torch.tensor([[[[True, False]]]]), None, 2, 2, 1, before=True)
    tensor([[[[ True,  True,  True, False]]]])
    """
    if mask is None and columns is None:
        return None
    given = columns if mask is None else mask
    assert given is not None
    if mask is None:
        mask = _open(given.new_empty(0), (1, 1, 1, own))
    mask = as_scores(mask, batch)
    mask = mask.expand(*mask.shape[:3], own)
    columns = _open(mask, (1, 1, 1, count)) if columns is None else _like(columns, mask)
    shape = [max(a, b) for a, b in zip(mask.shape[:3], columns.shape[:3], strict=True)]
    parts = [part.expand(*shape, part.shape[3]) for part in ((columns, mask) if before else (mask, columns))]
    return torch.cat(parts, 3)


def _open(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask that lets everything pass."""
    return torch.full(shape, True if like.dtype == torch.bool else 0.0, dtype=like.dtype, device=like.device)


def _like(mask: Tensor, other: Tensor) -> Tensor:
    """The mask in the form of another: bool, or added to the scores."""
    if mask.dtype == other.dtype:
        return mask
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=other.dtype).masked_fill(~mask, -torch.inf)
    if other.dtype == torch.bool:
        raise LayoutError("a mask of bool keys cannot stand beside one that is added to the scores")
    return mask.to(other.dtype)
