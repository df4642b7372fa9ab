"""How the small pipeline is called for a pair of the task."""

from __future__ import annotations

from typing import Any

import numpy as np

from .scenes import Picture, Scene
from .words import LENGTH

__all__ = ["call_arguments", "image", "written"]


def image(picture: Picture) -> Any:
    """A ``PIL.Image`` of (height, width, 3) numbers from 0 to 1."""
    from PIL import Image

    return Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))


def call_arguments(scene: Scene) -> dict[str, Any]:
    """Arguments of the pipeline for one pair; the references stand side by side in one picture.

    Parameters
    ----------
    scene : Scene

    Returns
    -------
    dict
        Without the number of steps and the generator.

    Examples
    --------
    >>> from sparse_ref_attn.toy.scenes import scene
    >>> from sparse_ref_attn.toy.sprites import SUBJECTS, load_sprites
    >>> import numpy as np
    >>> photo = np.zeros((128, 128, 3), np.float32)
    >>> pair = scene(load_sprites(SUBJECTS, "held-out"), (3,), task="pair", split="held-out", background=photo)
    >>> arguments = call_arguments(pair)
    >>> arguments["image"].size, arguments["height"], arguments["prompt"].split()[0]
    ((256, 128), 128, 'pair')
    """
    return written(scene.prompt, image(np.concatenate(scene.references, 1)), scene.target.shape[0])


def written(prompt: str, picture: Any, side: int) -> dict[str, Any]:
    """Arguments of the pipeline for a prompt and a picture of one's own; the output has `side` x `side` pixels."""
    return {
        "prompt": prompt,
        "image": picture,
        "height": side,
        "width": side,
        "max_area": side * side,
        "_auto_resize": False,
        "max_sequence_length": LENGTH,
        "guidance_scale": 1.0,
    }
