"""How far stored keys and values moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["moved"]


def moved(before: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
    """Norm of the difference over the norm of what is now, the largest of the pairs, () float32.

    Examples
    --------
    >>> moved([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 5.0])]) ** 2
    tensor(0.0294)
    """
    dtype = torch.promote_types(now[0].dtype, torch.float32)
    changes = []
    for old, new in zip(before, now, strict=True):
        change, size = (torch.linalg.vector_norm(x, dtype=dtype) for x in (new - old, new))
        changes.append(change / size.clamp_min(torch.finfo(dtype).tiny))
    return torch.stack(changes).max().float()
