"""Random dropping as a pure function, for trainers that own their loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LayoutError
from ..functional import pack_rows
from .random_drop import RandomDrop

__all__ = ["KeptReference", "drop_reference"]


class KeptReference(NamedTuple):
    """What `drop_reference` kept: tokens (B, K, D), ids (K, A) or (B, K, A), indices (K,) int64 ascending."""

    tokens: Tensor
    ids: Tensor | None
    indices: Tensor


def drop_reference(
    tokens: Tensor,
    ids: Tensor | None = None,
    keep: float | tuple[float, float] = (0.1, 1.0),
    *,
    distribution: str = "uniform",
    full_probability: float = 0.0,
    floor_per_reference: float | int = 0,
    sizes: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> KeptReference:
    """Keep a random share of reference tokens, with their positions.

    Call it on the references before they are put behind the noisy tokens; the model's prediction
    is sliced to those as ever.

    Parameters
    ----------
    tokens : Tensor, shape (B, R, D), any dtype
        Reference tokens only. The items of the batch keep the same rows, as their position ids are
        shared; for counts of their own, call it once an item.
    ids : Tensor, shape (R, A) or (B, R, A), optional
        Their position ids.
    keep, distribution, full_probability, floor_per_reference
        As in `RandomDrop`.
    sizes : sequence of int, optional
        Tokens of each reference, R in all, in order; floors need it. Default one reference.
    generator : torch.Generator, optional
        On any device. Default the CPU's global one.

    Returns
    -------
    KeptReference
        ``(tokens, ids, indices)``: (B, K, D), (K, A) or (B, K, A) or None, and (K,) int64, ascending,
        on the device of `tokens`. Dropped rows get a gradient of exactly zero.

    Raises
    ------
    LayoutError
        If the shapes disagree, or `sizes` do not sum to R.
    ConfigError
        For a setting outside its range.
    BudgetError
        If a reference has fewer tokens than its floor.

    Examples
    --------
    >>> import torch
    >>> reference, noisy = torch.randn(2, 16, 4), torch.randn(2, 16, 4)
    >>> ids = torch.cartesian_prod(torch.tensor([1]), torch.arange(4), torch.arange(4))
    >>> g = torch.Generator().manual_seed(0)
    >>> kept = drop_reference(reference, ids, keep=(0.25, 0.5), generator=g)
    >>> kept.tokens.shape, kept.ids.shape
    (torch.Size([2, 7, 4]), torch.Size([7, 3]))
    >>> x = torch.cat([noisy, kept.tokens], 1)  # then: prediction = transformer(x, ...)[:, :16]
    """
    if tokens.ndim != 3 or tokens.shape[1] == 0:
        raise LayoutError(f"tokens must be reference rows (B, R, D) with R >= 1, got {tuple(tokens.shape)}")
    rows = tokens.shape[1]
    if ids is not None and (ids.ndim not in (2, 3) or ids.shape[-2] != rows):
        raise LayoutError(f"ids must be (R, A) or (B, R, A) with R = {rows}, got {tuple(ids.shape)}")
    sizes = (rows,) if sizes is None else tuple(sizes)
    if sum(sizes) != rows or any(size < 1 for size in sizes):
        raise LayoutError(f"sizes must be at least 1 each and sum to the {rows} reference rows, got {sizes}")
    drop = RandomDrop(keep, distribution, full_probability=full_probability, floor_per_reference=floor_per_reference)
    indices = drop.draw(sizes, generator).indices.to(tokens.device)
    if ids is None:
        return KeptReference(pack_rows(tokens, indices), None, indices)
    return KeptReference(pack_rows(tokens, indices), pack_rows(ids, indices.to(ids.device), ids.ndim - 2), indices)
