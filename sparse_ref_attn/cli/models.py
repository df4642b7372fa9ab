"""What ``sra run`` runs: the pipeline of ``--model``, or the small one that ships."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..adapters.classes import load_class
from ..errors import ConfigError
from ..eval import checked_arguments, loading
from ..eval.loras import Lora, check_loras
from ..eval.meta_model import meta_transformer, pipeline_of
from ..eval.quantization import check_quantization
from ..eval.sizes import size_of
from ..toy.calls import written
from ..toy.pipeline import TRAINED, toy_pipeline
from ..vocabulary import MODELS
from .edits import Edit

__all__ = ["Model", "model_of"]

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_QWEN = "temperal_downsample"  # of its VAE's configuration


class Model(Protocol):
    """A pipeline to be, and how it is called for an `Edit`."""

    about: str
    """Said before anything runs; empty where there is nothing to say."""

    def check(self, edits: Sequence[Edit]) -> nn.Module | None:
        """Raise for what it cannot do, before it is loaded; its transformer without weights, if it can be known."""

    def load(self) -> tuple[Any, str]:
        """The pipeline and its device."""

    def arguments(self, pipe: Any, edit: Edit, images: list[Any]) -> dict[str, Any]:
        """Of the pipeline's call, without the generator."""

    def steps(self, edit: Edit) -> int | None:
        """Of the call, where it is known before the model is loaded."""


def model_of(options: argparse.Namespace) -> Model:
    """The model that the arguments ask for."""
    return Small(options) if options.model is None else Published(options)


class Published:
    """A diffusers pipeline from a directory or a hub id."""

    about = ""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._name = options, options.model
        self._loras = [Lora(path, scale) for path, scale in options.lora or ()]
        self._more = dict(options.set or ())
        self._known, self._distilled = pipeline_of(self._name) if Path(self._name).is_dir() else (None, False)

    def check(self, edits: Sequence[Edit]) -> nn.Module | None:
        options, here = self._options, Path(self._name).is_dir()
        if not here and (self._name in MODELS or not _HUB_ID.fullmatch(self._name) or Path(self._name).exists()):
            why = "a file" if Path(self._name).exists() else "neither"
            why = "a name that sra estimate knows, without weights" if self._name in MODELS else why
            raise ConfigError(f"the model must be a pipeline's directory or a hub id, got {self._name}, which is {why}")
        device = loading.check_place(options.device, options.offload)
        if options.quantize is not None:
            check_quantization(options.quantize, device)
        check_loras(self._loras)
        checked_arguments.check_reserved(self._more)
        if self._known is not None:
            loading.import_diffusers()
            cls, cell = load_class(self._known.cls), _cell(Path(self._name))
            checked_arguments.check_more(cls, self._more)
            for edit in edits:
                self._known.check_references(len(edit.images))
                checked_arguments.check_words(
                    cls, self._distilled, negative=edit.negative, guidance=edit.guidance, more=self._more
                )
                if cell is not None and edit.width and edit.height:
                    checked_arguments.check_size(cell, (edit.height, edit.width))
                elif cell is not None and (side := edit.width or edit.height or 0) % cell:
                    name, low = "width" if edit.width else "height", side // cell * cell
                    near = f"{max(cell, low)} or {low + cell}"
                    raise ConfigError(f"{name} must be a multiple of {cell} pixels, got {side}: {near}")
        return meta_transformer(self._name) if here and self._known is not None else None

    def load(self) -> tuple[Any, str]:
        options = self._options
        return loading.load_pipeline(
            self._name, device=options.device, dtype=options.dtype, offload=options.offload,
            quantize=options.quantize, loras=self._loras,
        )  # fmt: skip

    def arguments(self, pipe: Any, edit: Edit, images: list[Any]) -> dict[str, Any]:
        return checked_arguments.call_arguments(
            pipe, images, edit.prompt, size=size_of(pipe, images, edit.width, edit.height, self._more),
            steps=edit.steps,
            negative=edit.negative, guidance=edit.guidance, more=self._more,
        )  # fmt: skip

    def steps(self, edit: Edit) -> int | None:
        if edit.steps is not None or self._known is None:
            return edit.steps
        return self._known.steps(self._distilled)


class Small:
    """The trained model of the package: one or two references, 128 x 128 pixels, its own words."""

    about = (
        "No --model, so this is the small model that ships: 128 x 128 pixels, words of its own such as 'swap rows red "
        "to-blue', no FLUX."
    )
    _SIDE, _STEPS = 128, 12
    _OF_A_MODEL = ("negative", "guidance", "lora", "quantize", "width", "height", "dtype", "device", "set")

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def check(self, edits: Sequence[Edit]) -> nn.Module | None:
        told = [name for name in self._OF_A_MODEL if getattr(self._options, name) is not None]
        told += ["offload"] * (self._options.offload != "none")
        if told:
            raise ConfigError(f"--{told[0]} must come with --model, got the small model that ships")
        for edit in edits:
            told = [name for name in self._OF_A_MODEL[:6] if getattr(edit, name, None) is not None]
            if told:
                raise ConfigError(f"{told[0]} must come with --model, got the small model that ships for {edit.out}")
            if len(edit.images) > 2:
                raise ConfigError(f"the small model takes one reference or two, got {len(edit.images)}")
        return meta_transformer(TRAINED)

    def load(self) -> tuple[Any, str]:
        return toy_pipeline(), "cpu"

    def arguments(self, pipe: Any, edit: Edit, images: list[Any]) -> dict[str, Any]:
        from PIL import Image, ImageOps

        side = self._SIDE
        joined = Image.new("RGB", (side * len(images), side))
        for i, image in enumerate(images):
            joined.paste(ImageOps.fit(image, (side, side)), (side * i, 0))
        return written(edit.prompt, joined, side) | {"num_inference_steps": self.steps(edit)}

    def steps(self, edit: Edit) -> int | None:
        return edit.steps or self._STEPS


def _cell(folder: Path) -> int | None:
    """Pixels along a side of a token, from the configuration of a pipeline's VAE; None where it does not say."""
    try:
        config = json.loads((folder / "vae" / "config.json").read_text())
        halved = len(config["block_out_channels"]) - 1 if "block_out_channels" in config else len(config[_QWEN])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(2 ** (halved + 1))
