"""The pipelines that need no download, one trained and two of random weights, and the calls they are made for."""

from __future__ import annotations

import argparse
import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..eval.embedded import SIZES, kontext_pipeline
from ..pictures import open_image
from ..toy.calls import call_arguments
from ..toy.pipeline import toy_pipeline
from ..toy.scenes import TOKEN, Scene, scene
from ..toy.sprites import SUBJECTS, load_sprites
from ..toy.words import GRID

__all__ = ["SMALL", "Builtin", "builtin", "photo_of"]

SMALL = "small"
"""The name of the trained pipeline."""

RANDOM_WEIGHTS = (
    "Its weights are random (seeded): the pictures mean nothing, and neither does what the model looks at.\n"
    "Real are the speed of a whole call, and which tokens the rule keeps of the photo."
)
TRAINED_WEIGHTS = (
    "Its weights were trained on one procedural task; the subjects of this call were held out of it.\n"
    "It is no FLUX: what it keeps or loses says nothing about a published model."
)
_PROMPT = "the same cup on a marble table"


@dataclass(frozen=True)
class Builtin:
    """A pipeline and one call of it.

    Parameters
    ----------
    build : callable
        Makes the ``FluxKontextPipeline``, on the CPU.
    arguments : dict
        Of the call, without the number of steps and the generator.
    steps : int
    note : str
        What its weights are, for whoever looks at the pictures.
    pair : Scene, optional
        What the call asks for, and the answer.
    """

    build: Callable[[], Any]
    arguments: dict[str, Any]
    steps: int
    note: str
    pair: Scene | None = None


def builtin(options: argparse.Namespace, image: str | None) -> Builtin:
    """What ``--builtin``, ``--edit``, ``--prompt``, ``--steps`` and ``--seed`` ask for.

    Parameters
    ----------
    options : argparse.Namespace
    image : str, optional
        Of the user: the reference, or for the small model what its subjects stand on.

    Raises
    ------
    ConfigError
        For arguments of the other kind of model, or an unreadable image.
    """
    photo = photo_of(image)
    if options.builtin == SMALL:
        if options.prompt is not None:
            raise ConfigError(
                "--prompt must come with --builtin large or tiny: the small model's is drawn by --edit and --seed"
            )
        pair = _pair(options.edit or "place", options.seed, photo)
        return Builtin(toy_pipeline, call_arguments(pair), options.steps or 12, TRAINED_WEIGHTS, pair)
    if options.edit is not None:
        raise ConfigError(f"--edit must come with --builtin small, got --builtin {options.builtin}")
    size = SIZES[options.builtin]
    photo = _fitted(photo, size.side, size.pixels_per_token)
    arguments = {
        "prompt": _PROMPT if options.prompt is None else options.prompt,
        "image": photo,
        "height": photo.height,
        "width": photo.width,
        "max_area": photo.height * photo.width,
        "_auto_resize": False,
        "max_sequence_length": size.text,
    }
    return Builtin(lambda: kontext_pipeline(options.builtin), arguments, options.steps or 8, RANDOM_WEIGHTS)


def photo_of(path: str | None) -> Any:
    """The image at `path`, or the bundled photo."""
    return open_image(path or str(importlib.resources.files("sparse_ref_attn") / "assets" / "photo.jpg"))


def _pair(task: str, seed: int, photo: Any) -> Scene:
    """Held-out subjects on the middle of the photo."""
    edge, side = min(photo.size), GRID * TOKEN
    left, top = (photo.width - edge) // 2, (photo.height - edge) // 2
    square = photo.convert("RGB").crop((left, top, left + edge, top + edge)).resize((side, side))
    background = np.asarray(square, np.float32) / 255
    return scene(load_sprites(SUBJECTS, "held-out"), (seed,), task=task, split="held-out", background=background)


def _fitted(photo: Any, side: int, multiple: int) -> Any:
    """The photo at an area of about ``side**2`` pixels, its sides multiples of `multiple`."""
    scale = side / (photo.width * photo.height) ** 0.5
    width, height = (max(1, round(scale * edge / multiple)) * multiple for edge in photo.size)
    return photo if (width, height) == photo.size else photo.resize((width, height))
