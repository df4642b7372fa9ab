"""Pairs from a folder: pictures, and a ``metadata.jsonl`` that says which belong together."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..metadata import read_lines
from ..models import edit_pipelines, facts_of
from ..pictures import open_image
from .batches import Batch, encode, training_of

__all__ = ["FolderBatches"]

_FIELDS = ("reference", "target", "prompt")


class FolderBatches:
    """Batches of (reference, prompt, target) from a folder.

    Each line of ``metadata.jsonl`` is a JSON object with ``reference`` and ``target``, files of the folder, and
    ``prompt``. Every pass over the folder takes the pairs in a new order. Pictures are turned upright, as their EXIF
    orientation says.

    Parameters
    ----------
    folder : str
    size : int
        Pairs per batch and process.
    side : int
        Pictures are resized to this height and width in pixels.
    text_tokens : int
        Length of the prompts in tokens.
    seed : int
        Of the order.

    Raises
    ------
    ConfigError
        If the folder has no pairs, a line lacks a field, or a picture is missing or unreadable: all are opened here,
        so that a run does not end in its middle.
    """

    def __init__(self, folder: str, size: int, *, side: int = 512, text_tokens: int = 512, seed: int = 0) -> None:
        self.root, self.size, self.side, self.text_tokens, self.seed = Path(folder), size, side, text_tokens, seed
        if side < 16 or side % 16:
            raise ConfigError(f"side must be a multiple of 16 pixels, got {side}")
        self._check_text(max(facts.training.max_text for facts in edit_pipelines() if facts.training is not None))
        self.pairs = _pairs(self.root)
        for pair in self.pairs:
            for name in _FIELDS[:2]:
                open_image(self.root / pair[name])

    def check(self, pipe: Any) -> None:
        """Raise ConfigError if the pictures do not fit the pipeline's cells, or they or the prompts are larger than it
        takes any."""
        cell, facts = 2 * pipe.vae_scale_factor, facts_of(pipe)
        most = self.side
        if facts is not None and facts.area is not None:
            most = math.isqrt(inspect.signature(type(pipe).__call__).parameters[facts.area].default)
        if self.side % cell or self.side > most:
            limit = "" if most == self.side else f" and at most {most}"
            raise ConfigError(
                f"side must be a multiple of {cell} pixels{limit} for this {type(pipe).__name__}, got {self.side}"
            )
        self._check_text(training_of(pipe).max_text)

    def _check_text(self, most: int) -> None:
        if not 1 <= self.text_tokens <= most:
            raise ConfigError(f"text_tokens must lie in [1, {most}], as the pipeline's own, got {self.text_tokens}")

    def __len__(self) -> int:
        return len(self.pairs)

    def __call__(self, pipe: Any, step: int, process: int, processes: int) -> Batch:
        """The batch of one step and process."""
        first = (step * processes + process) * self.size
        pairs = [self.pairs[self._row(first + i)] for i in range(self.size)]
        targets, references = (
            torch.stack([self._pixels(pair[name]) for pair in pairs]) for name in ("target", "reference")
        )
        return encode(pipe, targets, references, [pair["prompt"] for pair in pairs], self.text_tokens)

    def _row(self, number: int) -> int:
        turn, place = divmod(number, len(self.pairs))
        return int(np.random.default_rng((self.seed, turn)).permutation(len(self.pairs))[place])

    def _pixels(self, name: str) -> Tensor:
        picture = open_image(self.root / name).resize((self.side, self.side))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def _pairs(root: Path) -> list[dict[str, str]]:
    index = root / "metadata.jsonl"
    if not index.is_file():
        raise ConfigError(f"a folder of pairs must hold metadata.jsonl, got {root}")
    return read_lines(index, _FIELDS, "pair")
