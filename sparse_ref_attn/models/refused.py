"""Models of diffusers with references that no family serves, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REFUSED"]

_AT = "diffusers.models.transformers.transformer_"

REFUSED: Mapping[str, str] = {
    f"{_AT}omnigen.OmniGenTransformer2DModel": (
        "OmniGen takes pictures, cuts them into tokens in its forward and puts them between the words, where its mask "
        "of all rows and its positions count them, at other places in each of the guidance's three calls, which are "
        "one batch: no argument has a row for each token"
    ),
    f"{_AT}ltx2.LTX2VideoTransformer3DModel": (
        "LTX-2's references are frames of a video whose blocks look at sound too, with times by row and masks between "
        "both streams"
    ),
    f"{_AT}wan_animate_2.WanAnimate2Transformer3DModel": (
        "Wan-Animate-2 runs its references in a call of its own and reads all of their keys by a mask of blocks"
    ),
}
"""Full names of transformer classes -> why references cannot be dropped or stored there."""
