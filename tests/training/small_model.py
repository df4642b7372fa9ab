"""The small pipeline's transformer with few and narrow blocks: what a training run does, without its arithmetic."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import diffusers

from sparse_ref_attn.toy.pipeline import build_transformer

__all__ = ["narrow_transformer"]

SIZES = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def narrow_transformer(seed: int = 0) -> Any:
    """As ``build_transformer``, which begins each block as the identity."""
    published = diffusers.FluxTransformer2DModel
    with patch.object(diffusers, "FluxTransformer2DModel", lambda **sizes: published(**sizes | SIZES)):
        return build_transformer(seed)
