r"""Attention mass under any mask of the scores, in plain PyTorch: for masks that are not of keys alone.

.. math:: s_{hk} = \frac{1}{N} \sum_{j=1}^{N} \operatorname{softmax}_k(a \langle q_{hj}, k_{h\cdot} \rangle + m_{hj})

A bool mask is 0 where it is True and -inf elsewhere. A query that may attend to no key gives nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_mass_masked"]

_BUDGET = 1 << 24  # elements of the scores held at once


def attention_mass_masked(q: Tensor, k: Tensor, span: tuple[int, int], mask: Tensor, query_stride: int = 1) -> Tensor:
    """q (B, N, H, C), k (B, S, H, C), mask (B or 1, H or 1, N or 1, S or 1) -> (B, H, R) float32, or float64 of such q.

    Examples
    --------
    Two keys alike, of which a bias of ln 3 on the second takes three quarters:

    >>> mask = torch.tensor([1.0, 3.0]).log().view(1, 1, 1, 2)
    >>> attention_mass_masked(torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1, 8), (1, 2), mask)
    tensor([[[0.7500]]])
    """
    q = q[:, ::query_stride]
    mask = mask[:, :, ::query_stride] if mask.shape[2] > 1 else mask
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = k.detach().transpose(1, 2).to(dtype)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    batch, queries, heads, channels = q.shape
    total = q.new_zeros((batch, heads, span[1] - span[0]), dtype=dtype)
    step = max(1, _BUDGET // (batch * heads * k.shape[1]))
    for start in range(0, queries, step):
        part = q[:, start : start + step].detach().transpose(1, 2).to(dtype)
        bias = mask[:, :, start : start + step] if mask.shape[2] > 1 else mask
        scores = part @ keys.mT * channels**-0.5 + bias.to(q.device, dtype)
        weights = scores.softmax(-1)[..., span[0] : span[1]]
        total += weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0).sum(2)
    return total / max(1, queries)
