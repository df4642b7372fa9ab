"""A loaded model that makes one edit after the other, and the record of each."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from .. import doctor
from ..config import SparseRef
from ..patching import patched
from ..pictures import open_image
from . import calling, failures
from .edits import Edit
from .memory import memory_of
from .models import Model
from .wanted import Wanted

__all__ = ["OF_DENSE", "Session", "shareable"]

OF_DENSE: dict[str, Any] = {"preset": None, "config": None, "reference_tokens": None, "flop_ratio": None, "notes": []}
"""What the record of a picture with every token says in place of the other's."""


class Session:
    """The model in memory.

    Parameters
    ----------
    options : argparse.Namespace
        Of ``sra run``.
    model : Model
        Loaded here.
    wanted : Wanted
        What is kept.
    """

    def __init__(self, options: argparse.Namespace, model: Model, wanted: Wanted) -> None:
        self._options, self._model, self._wanted = options, model, wanted
        self.pipe, device = model.load()
        self.device = doctor.device(device)
        self._versions = doctor.versions()

    def name_bar(self, text: str) -> None:
        """What stands beside the bar of the next picture."""
        self.pipe.set_progress_bar_config(desc=text, disable=self._options.quiet, leave=False)

    def make(self, edit: Edit, pictures: list[Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The picture, and how it was made, as JSON types.

        Parameters
        ----------
        edit : Edit
        pictures : list of PIL.Image.Image, optional
            Its references, where they are open already.

        Raises
        ------
        SparseRefError
            For a reference that cannot be read, a call that the pipeline or the library refuses, and too little memory.
        """
        options = self._options
        arguments, steps = self._arguments(edit, pictures)
        images, width, height = arguments["image"], arguments.get("width"), arguments.get("height")
        references = images if isinstance(images, list) else [images]
        output = (width, height) if width and height else None
        config = self._wanted.config(self.pipe, steps, references, output)
        with patched(self.pipe, config) as handle:
            image, seconds = self._timed(arguments, steps, edit.seed, config)
            flops, report = handle.flops(), handle.summary("dict")
        return image, {
            "images": [str(path) for path in edit.images],
            "prompt": edit.prompt,
            "negative": edit.negative,
            "guidance": edit.guidance,
            "seed": edit.seed,
            "steps": steps,
            "size": list(image.size),
            "model": options.model,
            "pipeline": type(self.pipe).__name__,
            "loras": [{"path": path, "scale": scale} for path, scale in options.lora or ()],
            "quantize": options.quantize,
            "preset": options.preset,
            "config": json.loads(config.to_json()),
            "device": self.device,
            "seconds": seconds,
            "reference_tokens": report["reference_tokens"],
            "flop_ratio": None if flops is None else flops.ratio,
            "notes": report["notes"],
            "versions": self._versions,
        }

    def make_dense(self, edit: Edit, pictures: list[Any] | None = None) -> tuple[Any, float]:
        """The picture with every token, and the seconds of its call; raises as `make`."""
        arguments, steps = self._arguments(edit, pictures)
        return self._timed(arguments, steps, edit.seed, SparseRef())

    def _arguments(self, edit: Edit, pictures: list[Any] | None) -> tuple[dict[str, Any], int]:
        images = [open_image(path) for path in edit.images] if pictures is None else pictures
        arguments = self._model.arguments(self.pipe, edit, images)
        return arguments, arguments.pop("num_inference_steps")

    def _timed(self, arguments: dict[str, Any], steps: int, seed: int, config: SparseRef) -> tuple[Any, float]:
        call = calling.caller(self.pipe, arguments, seed)
        with failures.memory_told(memory_of(self.pipe, config, arguments, self._options)):
            began = time.perf_counter()
            image = call(steps)
            return image, time.perf_counter() - began


def shareable(record: dict[str, Any]) -> dict[str, Any]:
    """The record that goes into the picture's file: names of files in place of their paths."""
    found = record | {"images": [Path(path).name for path in record["images"]]}
    found["loras"] = [lora | {"path": Path(lora["path"]).name} for lora in record["loras"]]
    if record["config"] is not None:
        found["config"] = record["config"] | {"select": _by_name(record["config"]["select"])}
    if record["model"] is not None and Path(record["model"]).is_dir():
        found["model"] = Path(record["model"]).resolve().name
    return found


def _by_name(select: Any) -> Any:
    """A selector's JSON with names of files in place of their paths, those of selectors inside it too."""
    if isinstance(select, list):
        return [_by_name(each) for each in select]
    if not isinstance(select, dict):
        return select
    return {
        key: Path(value).name if key == "path" and value is not None else _by_name(value)
        for key, value in select.items()
    }
