"""Models of diffusers with references that no family serves, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REFUSED"]

_AT = "diffusers.models.transformers.transformer_"

REFUSED: Mapping[str, str] = {
    f"{_AT}z_image.ZImageTransformer2DModel": (
        "Z-Image-Omni takes lists of pictures and cuts them into tokens in its forward, pads each picture's to a "
        "multiple of 32 and counts them again to find the generation: no argument has a row for each token"
    ),
    f"{_AT}omnigen.OmniGenTransformer2DModel": (
        "OmniGen takes pictures, cuts them into tokens in its forward and puts them between the words, where its mask "
        "of all rows and its positions count them, at other places in each of the guidance's three calls, which are "
        "one batch: no argument has a row for each token"
    ),
    f"{_AT}wan_animate_2.WanAnimate2Transformer3DModel": (
        "Wan-Animate-2 runs its driving video once, in a call of its own, and each frame of the generation reads the "
        "one frame of it of the same time, by a mask of blocks made of whole grids: one frame's keys of 23, so that "
        "nothing but 3 percent of a step could be saved"
    ),
}
"""Full names of transformer classes -> why references cannot be dropped or stored there."""
