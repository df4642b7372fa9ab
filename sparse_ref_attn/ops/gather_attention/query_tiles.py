"""Selections of query tiles: what must hold of `cu_tiles` and `bias` before a value is read."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import LayoutError

__all__ = ["check_tiles"]


def check_tiles(
    cu_tiles: Tensor | None, bias: Tensor | None, q: Tensor, k2: Tensor | None, ref_indices: Tensor | None
) -> None:
    """Raise a LayoutError unless `cu_tiles` (T + 1,) and `bias` (T, W) fit the call; their dtypes and devices too."""
    if cu_tiles is None:
        if bias is not None:
            raise LayoutError("bias has a row for each query tile and needs cu_tiles, got bias without them")
        return
    if cu_tiles.dtype not in (torch.int32, torch.int64):
        raise LayoutError(f"cu_tiles must be int32 or int64, got {cu_tiles.dtype}")
    if cu_tiles.ndim != 1 or cu_tiles.shape[0] < 2:
        raise LayoutError(f"cu_tiles must be (T + 1,) for at least one tile, got {tuple(cu_tiles.shape)}")
    if ref_indices is None and bias is None:
        raise LayoutError("cu_tiles say whose ref_indices or bias are whose, got them with neither")
    if bias is not None:
        if k2 is None:
            raise LayoutError("bias is added to the scores of k2, got it without k2")
        if bias.dtype != torch.float32:
            raise LayoutError(f"bias must be float32, got {bias.dtype}")
        if bias.ndim != 2 or bias.shape[0] != cu_tiles.shape[0] - 1 or (bias.shape[1] > 1 and bias.stride(1) != 1):
            raise LayoutError(
                f"bias must be ({cu_tiles.shape[0] - 1}, W), contiguous in its last dimension, "
                f"got {tuple(bias.shape)} with strides {bias.stride()}"
            )
    for name, x in (("cu_tiles", cu_tiles), ("bias", bias)):
        if x is not None and x.device != q.device:
            raise LayoutError(f"{name} must lie on the device of q, {q.device}, got {x.device}")
