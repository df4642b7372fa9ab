"""Qwen-Image's references alone: its layers need a row of text, and told shapes count the rows."""

from __future__ import annotations

from torch import Tensor

from ...adapters.alone import Kwargs, ReferencesAlone, at_time
from ...functional import pack_rows
from ...types import TokenLayout

__all__ = ["QwenReferencesAlone"]


class QwenReferencesAlone(ReferencesAlone):
    """Beside one row of text, all zero: rotary embedding of no rows fails. It stands behind the largest picture's
    positions, so what is computed holds for one size of the generation."""

    def arguments(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor, timestep: float) -> Kwargs:
        x, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        own = {
            **kwargs,
            "hidden_states": pack_rows(x, rows.to(x.device)),
            "encoder_hidden_states": text.new_zeros(text.shape[0], 1, text.shape[2]),
            "encoder_hidden_states_mask": None,
            "img_shapes": [[(1, 1, rows.shape[0])] for _ in kwargs["img_shapes"]],
        }
        return at_time(own, timestep)

    def conditions(self, kwargs: Kwargs) -> str:
        shapes = kwargs["img_shapes"][0]
        return f"img_shapes={[tuple(shape) for shape in (shapes if isinstance(shapes, list) else [shapes])]}"
