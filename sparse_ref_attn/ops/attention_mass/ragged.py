"""Where the items of a ragged batch lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Ragged"]


class Ragged(NamedTuple):
    """Where items lie in packed rows: int32 (B + 1,), (B + 1,), (B + 1,), (B,), and the longest item's lengths."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    cu_seqlens_ref: Tensor
    ref_starts: Tensor
    max_q: int
    max_ref: int
