"""The one model that is in memory, and the calls that it takes."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError, SparseRefError
from ..eval.checked_arguments import call_arguments, check_more
from ..eval.loading import load_pipeline, open_image
from ..eval.sizes import size_of
from ..hooks.compiled import unwrap
from ..toy.calls import image, written
from ..toy.pipeline import toy_pipeline
from ..toy.scenes import TOKEN, scene
from ..toy.sprites import SUBJECTS, load_sprites
from ..toy.words import GRID, unknown
from .edit import Edit

__all__ = ["SMALL", "Model", "StoppedError", "example"]

SMALL = "small"
"""The trained model that ships in the package, in place of a path."""

_SMALL_SIDE, _SMALL_STEPS = GRID * TOKEN, 12


class StoppedError(Exception):
    """Whoever asked for a run wants no more of it."""


@dataclass
class Model:
    """A pipeline that is loaded.

    Parameters
    ----------
    pipe : diffusers pipeline
    name : str
        `SMALL`, or the path or hub id that it came from.
    device : str
    more : mapping
        Further arguments of every call.
    """

    pipe: Any
    name: str
    device: str
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str = SMALL, *, more: Mapping[str, Any] | None = None, **settings: Any) -> Model:
        """The small model, or what `eval.loading.load_pipeline` loads.

        Parameters
        ----------
        name : str
        more : mapping, optional
            Further arguments of the pipeline's calls.
        **settings
            ``device``, ``dtype`` and ``offload`` of `load_pipeline`.

        Raises
        ------
        ConfigError, UnsupportedModelError, VersionError
            As `load_pipeline`.
        """
        if name == SMALL:
            pipe, where = toy_pipeline(), "cpu"
        else:
            pipe, where = load_pipeline(name, **settings)
            check_more(type(pipe), more or {})
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe, name, where, dict(more or {}))

    @staticmethod
    def check(name: str) -> None:
        """Raise ConfigError where a name is plainly no model's, before the one in memory makes room for it."""
        if name != SMALL and (os.path.exists(name) or name.startswith((".", "/", "~")) or "\\" in name):
            if not os.path.isfile(os.path.join(name, "model_index.json")):
                raise ConfigError(f"a pipeline's directory must hold model_index.json, got {name}")
        elif name != SMALL and (not name or name.count("/") != 1):
            raise ConfigError(f"the model must be a directory or a hub id such as owner/name, got {name!r}")

    @property
    def small(self) -> bool:
        return self.name == SMALL

    @property
    def transformer(self) -> Any:
        """Out of whatever it is wrapped in."""
        return unwrap(self.pipe.transformer)

    def arguments(self, edit: Edit) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call, ``num_inference_steps`` among them.

        Raises
        ------
        ConfigError
            For a picture that cannot be read, or what the pipeline does not take.
        """
        images = [open_image(path) for path in edit.images]
        if not self.small:
            size = size_of(self.pipe, images, edit.width, edit.height, self.more)
            return call_arguments(self.pipe, images, edit.prompt, size=size, steps=edit.steps, more=self.more)
        if len(images) > 1:
            raise ConfigError(f"the small model takes one photo, got {len(images)}")
        if edit.width or edit.height:
            raise ConfigError(f"the small model makes pictures of {_SMALL_SIDE} x {_SMALL_SIDE} pixels alone")
        if words := unknown(edit.prompt):
            raise ConfigError(
                f"the small model knows the words of its own task alone, got {' '.join(words)}: draw an example to see "
                "a prompt, or load a model of your own"
            )
        steps = _SMALL_STEPS if edit.steps is None else edit.steps
        return written(edit.prompt, _fitted(images[0]), _SMALL_SIDE) | {"num_inference_steps": steps}

    def caller(self, arguments: dict[str, Any], seed: int, told: Callable[[int, int], None]) -> Callable[[int], Any]:
        """``call(steps) -> picture`` from the same noise every time; `told` hears each step that is done, of how many.

        What diffusers refuses is a ConfigError; what `told` raises ends the run.
        """
        arguments = {name: value for name, value in arguments.items() if name != "num_inference_steps"}

        def call(steps: int) -> Any:
            def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                told(step + 1, steps)
                return {}

            if "callback_on_step_end" in inspect.signature(type(self.pipe).__call__).parameters:
                arguments["callback_on_step_end"] = after
            generator = torch.Generator("cpu").manual_seed(seed)
            try:
                return self.pipe(**arguments, num_inference_steps=steps, generator=generator).images[0]
            except (TypeError, ValueError) as error:  # how diffusers refuses a picture or an argument
                if isinstance(error, SparseRefError):
                    raise
                raise ConfigError(f"{type(self.pipe).__name__} refused the call: {error}") from error
            finally:
                if hasattr(self.pipe, "maybe_free_model_hooks"):  # also after a run that was broken off
                    self.pipe.maybe_free_model_hooks()

        return call

    def unload(self) -> None:
        """Let go of the weights."""
        self.pipe = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def example(task: str, seed: int) -> tuple[Any, str]:
    """A picture and a prompt of the small model's task, with a subject that it never saw.

    Parameters
    ----------
    task : str
        One of ``vocabulary.EDITS``, without "pair".
    seed : int

    Examples
    --------
    >>> picture, prompt = example("place", 1)
    >>> picture.size, prompt.split()[0]
    ((128, 128), 'place')
    """
    drawn = scene(load_sprites(SUBJECTS, "held-out"), (seed,), task=task, split="held-out")
    return image(drawn.references[0]), drawn.prompt


def _fitted(photo: Any) -> Any:
    """The middle of a photo, at the small model's size."""
    if photo.size == (_SMALL_SIDE, _SMALL_SIDE):
        return photo
    edge = min(photo.size)
    left, top = (photo.width - edge) // 2, (photo.height - edge) // 2
    return photo.crop((left, top, left + edge, top + edge)).resize((_SMALL_SIDE, _SMALL_SIDE))
