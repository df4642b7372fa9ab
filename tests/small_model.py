"""The small pipeline's transformer with few and narrow blocks: what a run does, without its arithmetic."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import diffusers
from torch import nn

from sparse_ref_attn.toy.pipeline import build_transformer
from sparse_ref_attn.toy.words import seeded

__all__ = ["looking_transformer", "narrow_transformer"]

SIZES = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def narrow_transformer(seed: int = 0) -> Any:
    """As ``build_transformer``, which begins each block as the identity."""
    published = diffusers.FluxTransformer2DModel
    with patch.object(diffusers, "FluxTransformer2DModel", lambda **sizes: published(**sizes | SIZES)):
        return build_transformer(seed)


def looking_transformer(seed: int = 0) -> Any:
    """One that is not trained either, and does look at its references."""
    model = narrow_transformer(seed)
    with seeded(seed):
        for weight in model.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.05)
    return model
