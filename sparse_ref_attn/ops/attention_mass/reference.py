"""The definition: softmax over all keys, columns of the span, mean over the queries.

With tiles, the mean of each tile's queries. A query that may attend to no key gives nothing, and no queries give zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["attention_mass_reference"]


def attention_mass_reference(
    q: Tensor,
    k: Tensor,
    span: tuple[int, int],
    scale: float,
    key_mask: Tensor | None = None,
    lse: Tensor | None = None,
    tiles: Sequence[int] | None = None,
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C), key_mask (B, S) bool, lse (B, H, N) -> (B, H, R), in the precision of q.

    With the T + 1 offsets of `tiles`, (B, H, T, R).
    """
    start, stop = span
    scores = torch.einsum("bnhc,bshc->bhns", q, k) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    if lse is None:
        weights = scores.softmax(dim=-1)[..., start:stop]
        if key_mask is not None:
            weights = weights.masked_fill(~key_mask.any(dim=1)[:, None, None, None], 0.0)
    else:
        pivot = lse.masked_fill(lse == float("-inf"), float("inf"))[..., None].to(scores.dtype)
        weights = (scores[..., start:stop] - pivot).exp()
    if tiles is None:
        return _mean(weights)
    out = weights.new_zeros((*weights.shape[:2], len(tiles) - 1, stop - start))
    for tile, (first, last) in enumerate(pairwise(tiles)):
        out[:, :, tile] = _mean(weights[:, :, first:last])
    return out


def _mean(weights: Tensor) -> Tensor:
    return weights.mean(dim=2) if weights.shape[2] else weights.sum(dim=2)
