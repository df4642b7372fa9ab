r"""Attention mass under any mask of the scores, in plain PyTorch: for masks that are not of keys alone.

.. math:: s_{hk} = \frac{1}{N} \sum_{j=1}^{N} \operatorname{softmax}_k(a \langle q_{hj}, k_{h\cdot} \rangle + m_{hj})

A bool mask is 0 where it is True and -inf elsewhere. A query that may attend to no key gives nothing. With tiles, the
mean of each tile's queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .impl.tiling import chunks_of, mean_of, sum_tiles
from .offsets import check_tiles

__all__ = ["attention_mass_masked"]

_BUDGET = 1 << 24  # elements of the scores held at once


def attention_mass_masked(
    q: Tensor,
    k: Tensor,
    span: tuple[int, int],
    mask: Tensor,
    query_stride: int = 1,
    *,
    tiles: Sequence[int] | None = None,
    reduce_heads: bool = False,
) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C), mask (B or 1, H or 1, N or 1, S or 1) -> (B, H, R) float32, or float64 of such q.

    With `tiles`, T + 1 offsets that the host knows, (B, H, T, R). With `reduce_heads` without H, the mean over the
    heads. LayoutError if tiles do not cover the queries in order, or only every n-th query is wanted of them.

    Examples
    --------
    Two keys alike, of which a bias of ln 3 on the second takes three quarters:

    >>> mask = torch.tensor([1.0, 3.0]).log().view(1, 1, 1, 2)
    >>> attention_mass_masked(torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1, 8), (1, 2), mask)
    tensor([[[0.7500]]])
    """
    if tiles is not None:
        check_tiles(tiles, q.shape[1], query_stride)
    q = q[:, ::query_stride]
    mask = mask[:, :, ::query_stride] if mask.shape[2] > 1 else mask
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = k.detach().transpose(1, 2).to(dtype)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    batch, queries, heads, channels = q.shape
    cut = (0, queries) if tiles is None else tiles
    total = q.new_zeros((batch, 1 if reduce_heads else heads, len(cut) - 1, span[1] - span[0]), dtype=dtype)
    step = max(1, _BUDGET // max(1, batch * heads * k.shape[1]))
    for some, runs in chunks_of(cut, step):
        part = q[:, some].detach().transpose(1, 2).to(dtype)
        bias = mask[:, :, some] if mask.shape[2] > 1 else mask
        scores = part @ keys.mT * channels**-0.5 + bias.to(q.device, dtype)
        weights = scores.softmax(-1)[..., span[0] : span[1]]
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
        for item, out in zip(weights, total, strict=True):
            sum_tiles(item, runs, out)
    mean_of(total, cut, heads if reduce_heads else 1)
    total = total[:, :, 0] if tiles is None else total
    return total[:, 0] if reduce_heads else total
