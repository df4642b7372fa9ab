"""Models of diffusers with references that no family serves, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REFUSED"]

_AT = "diffusers.models.transformers.transformer_"

REFUSED: Mapping[str, str] = {
    f"{_AT}omnigen.OmniGenTransformer2DModel": (
        "OmniGen takes pictures, cuts them into tokens in its forward and puts them between the words, at other places "
        "in each of the guidance's three calls, which are one batch: one of the three has no references, and one table "
        "of positions, the first call's, turns the rows of all, so that none can leave at a place of its own"
    ),
    f"{_AT}wan_animate_2.WanAnimate2Transformer3DModel": (
        "Wan-Animate-2 runs its driving video once, in a call of its own, and each frame of the generation reads the "
        "one frame of it of the same time, by a mask of blocks made of whole grids: one frame's keys of 23, so that "
        "nothing but 3 percent of a step could be saved"
    ),
}
"""Full names of transformer classes -> why references cannot be dropped or stored there."""
