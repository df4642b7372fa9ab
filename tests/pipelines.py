"""Every supported pipeline as a `Case`: a tiny real one, one way to call it, and a record of what its model is given.

References default to another shape than the output, so that mixing up rows and columns, or the two grids, is noticed::

    case = CASES["klein"]
    pipe = case.build()
    calls, remove = record_calls(pipe.transformer)
    images = case.call(pipe, references=2, cfg=True)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)

from tests import pipeline_arguments as arguments
from tests import text_encoders, tiny_models
from tests.pictures import generator
from tests.pipeline_arguments import PROMPTS, Request

SIZES = ((96, 64), (64, 64), (64, 96))  # references in pixels, (width, height)
REFERENCE_AREA = 80**2  # Qwen references are resized to this; SIZES stay what they are
_QWEN = (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus, pipeline_qwenimage_edit_inpaint)
_sides: list[int] = []  # of all that are inside `small_pictures`, in whatever thread


def _made_small(module: Any, most: Callable[[], int]) -> None:
    published = module.calculate_dimensions
    module.calculate_dimensions = lambda area, ratio: published(min(area, most()) if _sides else area, ratio)


for _module in _QWEN:
    _made_small(_module, lambda: REFERENCE_AREA)
_made_small(pipeline_longcat_image_edit, lambda: _sides[-1] ** 2)


@contextmanager
def small_pictures(side: int = 64) -> Iterator[None]:
    """Inside, Qwen makes `REFERENCE_AREA` of a reference and LongCat `side` squared, instead of a million pixels."""
    _sides.append(side)
    try:
        yield
    finally:
        _sides.remove(side)


@dataclass(frozen=True)
class Case:
    """One pipeline: how it is built, how it is called, what it allows.

    Attributes
    ----------
    name : str
        Key in `CASES`.
    build : callable
        ``build(seed=0, layers=2, single=2, heads=2, head_dim=16) -> pipe``.
    arguments : callable
        From (pipe, `Request`) to the pipeline's own arguments.
    references : tuple of int
        Numbers of references in the sequence that the pipeline allows.
    cfg : bool
        Whether ``cfg=True`` makes two transformer calls a step.
    batch : tuple of int
        Numbers of prompts that the pipeline allows.
    latents : bool
        Whether references may be given as latents, which the VAE then does not encode.
    text_to_image : bool
        Whether it may be called without an image.
    free : bool
        Whether the first reference may have another shape than the output.
    side : int
        Default side of the output in pixels.
    sizes : tuple of (int, int)
        Default (width, height) of each reference in pixels.
    output_type : str
        The default of `call`: "np" for pictures, "latent" for what the VAE would make them of.
    """

    name: str
    build: Callable[..., Any]
    arguments: Callable[[Any, Request], dict[str, Any]]
    references: tuple[int, ...] = (1,)
    cfg: bool = True
    batch: tuple[int, ...] = (1, 2)
    latents: bool = False
    text_to_image: bool = False
    free: bool = True
    side: int = 64
    sizes: tuple[tuple[int, int], ...] = SIZES
    output_type: str = "np"

    def call(
        self, pipe: Any, *, references: int = 1, batch: int = 1, steps: int = 3, side: int | None = None,
        cfg: bool = False, images_per_prompt: int = 1, sizes: Sequence[tuple[int, int]] | None = None, seed: int = 0,
        latents: bool = False, first: int = 0, callback: Callable[..., dict] | None = None, **kwargs: Any,
    ) -> np.ndarray:  # fmt: skip
        """Generate images.

        Parameters
        ----------
        references : int
            How many; 0 is a call without an image.
        batch, images_per_prompt : int
            Prompts (of different lengths), and images for each.
        steps : int
            Denoising steps; each is one transformer call, or two under `cfg`.
        side : int, optional
            Output side in pixels.
        sizes : sequence of (int, int), optional
            (width, height) of each reference in pixels. Inpainted pictures are always `side` x `side`.
        seed, first : int
            Seed of the noise; seed of the first reference's picture (another `first`, other references).
        latents : bool
            Give the references as (random) latents.
        callback : callable, optional
            ``callback_on_step_end``.
        **kwargs
            Pipeline arguments, over all others.

        Returns
        -------
        numpy.ndarray
            (batch * images_per_prompt, side, side, 3) in [0, 1], or latents as the pipeline gives them, in float32.
        """
        allowed = (0, *self.references) if self.text_to_image else self.references
        if references not in allowed:
            raise ValueError(f"{self.name} takes {allowed} references, got {references}")
        if batch not in self.batch:
            raise ValueError(f"{self.name} takes {self.batch} prompts, got {batch}")
        if (cfg and not self.cfg) or (latents and not self.latents):
            raise ValueError(f"{self.name}: cfg {self.cfg}, latents {self.latents}; got {cfg}, {latents}")
        side = self.side if side is None else side
        request = Request(references, batch, side, cfg, tuple(sizes or self.sizes), latents, first)
        common = {
            "prompt": list(PROMPTS[:batch]), "num_inference_steps": steps, "height": side, "width": side,
            "num_images_per_prompt": images_per_prompt, "generator": generator(seed), "output_type": self.output_type,
            "callback_on_step_end": callback,
        }  # fmt: skip
        known = _parameters(type(pipe))
        if callback is not None and "callback_on_step_end" not in known:
            raise ValueError(f"{self.name} calls nothing at the end of a step, got {callback}")
        common = {name: value for name, value in common.items() if name in known}
        with small_pictures(side):
            images = pipe(**common | self.arguments(pipe, request) | kwargs).images
        return images.float().numpy() if isinstance(images, torch.Tensor) else images

    def dense(self, **request: Any) -> np.ndarray:
        """What `call` makes of a new pipeline, computed once for each request; arguments must be hashable."""
        return _dense(self, tuple(request.items()))

    def model(self, **build: int) -> Any:
        """The transformer of a new pipeline, one for all that ask: to be called, and neither changed nor patched."""
        return _model(self, tuple(build.items()))


@cache
def _parameters(pipeline: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline.__call__).parameters


@cache
def _dense(case: Case, request: tuple[tuple[str, Any], ...]) -> np.ndarray:
    pictures = case.call(case.build(), **dict(request))
    pictures.flags.writeable = False
    return pictures


@cache
def _model(case: Case, build: tuple[tuple[str, int], ...]) -> Any:
    return case.build(**dict(build)).transformer


_FLUX: dict[str, Any] = {"side": 32, "sizes": ((48, 32),)}
_MANY: dict[str, Any] = {"references": (1, 2, 3)}
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("kontext", tiny_models.kontext(diffusers.FluxKontextPipeline), arguments.kontext,
             latents=True, text_to_image=True, **_FLUX),
        Case("kontext_inpaint", tiny_models.kontext(diffusers.FluxKontextInpaintPipeline),
             arguments.kontext_inpaint, free=False, **_FLUX),
        Case("kontext_inpaint_reference", tiny_models.kontext(diffusers.FluxKontextInpaintPipeline),
             arguments.kontext_inpaint_reference, **_FLUX),
        Case("flux2", tiny_models.flux2(diffusers.Flux2Pipeline, text_encoders.mistral3, guidance=True),
             arguments.flux2, cfg=False, text_to_image=True, **_MANY),
        Case("klein", tiny_models.flux2(diffusers.Flux2KleinPipeline, text_encoders.qwen3), arguments.klein,
             text_to_image=True, **_MANY),
        Case("klein_inpaint", tiny_models.flux2(diffusers.Flux2KleinInpaintPipeline, text_encoders.qwen3),
             arguments.klein_inpaint, latents=True, free=False, **_MANY),
        Case("klein_kv", tiny_models.flux2(diffusers.Flux2KleinKVPipeline, text_encoders.qwen3), arguments.flux2,
             cfg=False, text_to_image=True, **_MANY),
        Case("qwen_edit", tiny_models.qwen(diffusers.QwenImageEditPipeline), arguments.qwen_edit),
        Case("qwen_edit_plus", tiny_models.qwen(diffusers.QwenImageEditPlusPipeline), arguments.qwen_edit_plus,
             batch=(1,), **_MANY),
        Case("qwen_edit_plus_2511", tiny_models.qwen(diffusers.QwenImageEditPlusPipeline, zero_cond_t=True),
             arguments.qwen_edit_plus, batch=(1,), **_MANY),
        Case("qwen_edit_inpaint", tiny_models.qwen(diffusers.QwenImageEditInpaintPipeline), arguments.qwen_inpaint,
             free=False),
        Case("longcat", tiny_models.longcat(diffusers.LongCatImageEditPipeline), arguments.longcat, batch=(1,),
             free=False),
    )
}  # fmt: skip


def each_case(
    allows: Callable[[Case], bool] = lambda case: True, cases: Mapping[str, Case] = CASES
) -> pytest.MarkDecorator:
    """Parametrize a test's argument ``case`` over the cases that `allows` accepts."""
    allowed = [case for case in cases.values() if allows(case)]
    return pytest.mark.parametrize("case", allowed, ids=[case.name for case in allowed])


def record_calls(transformer: torch.nn.Module) -> tuple[list[dict[str, Any]], Callable[[], None]]:
    """Note what each call of `transformer` is given.

    Returns
    -------
    calls : list of dict
        One a call, growing: the shape of every tensor argument by name, every other argument as it is.
    remove : callable
        Stops the recording.
    """
    calls: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append({k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})

    return calls, transformer.register_forward_pre_hook(note, with_kwargs=True).remove
