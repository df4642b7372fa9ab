"""A pipeline under evaluation: how an example becomes its call, and what tells its weights from others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import SparseRef
from ..errors import ConfigError, SparseRefError
from ..hooks.compiled import unwrap
from ..patching import patched
from ..record import RunRecord
from .checked_arguments import call_arguments, check_class, check_more
from .counted import counted_work
from .examples import Example, Mask
from .loading import check_device, load_pipeline
from .settings import Setting
from .step_caches import step_cached

__all__ = ["EvalModel", "Run"]

_END = 1 << 20  # bytes of each end of a file of weights that its id is made from
_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Run:
    """One picture, the record of what took part, None of a run with every token, and the share that was used.

    The share is that of the reference tokens a step, times that of the steps; of a step cache's run the share of the
    transformer's FLOPs that really ran.
    """

    picture: Any
    record: RunRecord | None
    share: float = 1.0


class EvalModel:
    """One pipeline, by the name that it has in results.

    Parameters
    ----------
    name : str
    path : str
        A pipeline's folder or hub id, or the ``transformer`` folder that ``sra train`` writes, which is put into the
        small pipeline.
    side : int, optional
        Of the output, in pixels; default 128 for the small pipeline, else the pipeline's own size.
    steps : int
    device, dtype : str, optional
        As `load_pipeline`; the small pipeline runs in float32.
    more : mapping, optional
        Further arguments of the pipeline's call.

    Attributes
    ----------
    id : str
        Of the weights: it changes when they do.

    Raises
    ------
    ConfigError
        If `path` holds no model, or as `load_pipeline`.
    """

    def __init__(
        self,
        name: str,
        path: str,
        *,
        side: int | None = None,
        steps: int = 8,
        device: str | None = None,
        dtype: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.path, self.steps, self.more = name, path, steps, dict(more or {})
        root = Path(path)
        self.small = (root / "config.json").is_file() and not (root / "model_index.json").is_file()
        if self.small:
            from ..toy.pipeline import WEIGHTS, toy_pipeline
            from ..toy.words import LENGTH

            self.pipe = toy_pipeline(path)
            if device is not None:
                check_device(device)
                self.pipe.to(device)
            self.side: int | None = 128 if side is None else side
            self.more = {"_auto_resize": False, "max_sequence_length": LENGTH, **self.more}
            self.id = _weights_id([root, WEIGHTS / "vae"])
        else:
            if root.is_dir() and not (root / "model_index.json").is_file():
                raise ConfigError(f"a model's folder must hold model_index.json or config.json, got {path}")
            if device is None and torch.cuda.is_available():
                device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of this process, under a launcher
            self.pipe, _ = load_pipeline(path, device=device, dtype=dtype)
            self.side = side
            self.id = _weights_id([root]) if root.is_dir() else path
        check_more(type(self.pipe), self.more)
        self.pipe.set_progress_bar_config(disable=True)
        self._several = check_class(self.pipe).several
        self._work: dict[tuple[tuple[int, int], ...], int] = {}

    @property
    def about(self) -> dict[str, Any]:
        """What its pictures depend on, as JSON types."""
        return {"id": self.id, "side": self.side, "arguments": self.more}

    def generate(self, example: Example, seed: int, *, output: str = "pil", steps: int | None = None) -> Any:
        """The picture of one example, from the noise of `seed`, by the pipeline as it is, patched or not.

        Parameters
        ----------
        example : Example
        seed : int
        output : {"pil", "np"}
            A picture, or what it is rounded from: (H, W, 3) numbers from 0 to 1.
        steps : int, optional
            Instead of the model's.

        Raises
        ------
        ConfigError
            If the pipeline refuses the call.
        """
        size = None if self.side is None else (self.side, self.side)
        arguments = call_arguments(
            self.pipe, self._references(example), example.prompt, size=size, steps=steps or self.steps, more=self.more
        )
        noise = torch.Generator("cpu").manual_seed(seed)
        try:
            return self.pipe(**arguments, output_type=output, generator=noise).images[0]
        except (TypeError, ValueError) as error:  # how diffusers refuses a picture or an argument
            if isinstance(error, SparseRefError):
                raise
            raise ConfigError(f"{type(self.pipe).__name__} refused {example.id}: {error}") from error

    def run(
        self, example: Example, seed: int, config: SparseRef | Setting | None = None, *, output: str = "pil"
    ) -> Run:
        """As `generate`, patched for this one picture, or as a setting says; None is dense.

        Raises
        ------
        ConfigError
            As `generate`.
        SparseRefError
            What `patch` refuses, and as `step_cached`.
        """
        setting = config if isinstance(config, Setting) else Setting(config=config)
        handle, work, steps = None, None, setting.steps or self.steps
        with ExitStack() as stack:
            if setting.step_cache is not None:
                stack.enter_context(step_cached(self.pipe, setting.step_cache))
            if setting.config is not None:
                handle = stack.enter_context(patched(self.pipe, setting.config))
            if setting.step_cache is not None:
                work = stack.enter_context(counted_work(unwrap(self.pipe.transformer)))
            picture = self.generate(example, seed, output=output, steps=steps)
        record, share = None, steps / self.steps
        if handle is not None:
            record = handle.record
            share *= record.mean_tokens / record.layout.reference_tokens
        if work is not None:
            share = (work().total + (0 if record is None else record.scoring_flops)) / self._dense_work(example, seed)
        return Run(picture, record, share)

    def _dense_work(self, example: Example, seed: int) -> int:
        """FLOPs of the dense run, which are those of every example with the same references' and output's sizes."""
        sizes = tuple(picture.size for picture in self._references(example))
        if sizes not in self._work:
            with counted_work(unwrap(self.pipe.transformer)) as work:
                self.generate(example, seed, output="latent", steps=1)
            self._work[sizes] = work().total * self.steps
        return self._work[sizes]

    def masks(self, example: Example) -> list[Mask] | None:
        """The masks of the references as the pipeline is given them."""
        if example.reference_masks is None:
            return None
        if self._several or len(example.reference_masks) == 1:
            return list(example.reference_masks)
        import numpy as np

        return [np.concatenate(example.reference_masks, axis=1)]

    def _references(self, example: Example) -> list[Any]:
        """Side by side where the pipeline takes one picture: how several references are given to FLUX.1 Kontext."""
        pictures = list(example.references)
        if self.small:
            pictures = [p if p.size == (self.side, self.side) else p.resize((self.side, self.side)) for p in pictures]
        if self._several or len(pictures) == 1:
            return pictures
        from PIL import Image

        height = max(picture.height for picture in pictures)
        pictures = [picture.resize((picture.width * height // picture.height, height)) for picture in pictures]
        joined = Image.new("RGB", (sum(picture.width for picture in pictures), height))
        left = 0
        for picture in pictures:
            joined.paste(picture, (left, 0))
            left += picture.width
        return [joined]


def _weights_id(folders: list[Path]) -> str:
    """A digest of the weights' names, sizes, beginnings and ends."""
    digest = hashlib.sha256()
    for folder in folders:
        files = (path for path in folder.rglob("*") if path.is_file())
        for path in sorted(path for path in files if path.suffix in _SUFFIXES or path.name == "config.json"):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_END))
                file.seek(max(0, size - _END))
                digest.update(file.read(_END))
    return digest.hexdigest()[:16]
