"""What a command's arguments ask for: a preset and how much it keeps, or a speed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..config import SparseRef
from ..errors import ConfigError
from ..estimation import Amount
from ..planning import plan
from .common import settings

__all__ = ["Wanted", "check_alone"]

Size = tuple[int, int]
_MEGAPIXEL = 1024 * 1024  # to which the pipelines scale a larger reference


class Wanted:
    """A preset and an amount, or a speed, for which the setting is planned call by call.

    Parameters
    ----------
    options : argparse.Namespace
        Of a command with `common.add_config` and `common.add_speedup`.

    Raises
    ------
    ConfigError
        For a speed beside a preset or another setting, and as `Amount`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.speedup: float | None = options.speedup
        check_alone(options)
        self.amount = None if self.speedup is not None else Amount(options.preset, options.keep, settings(options))

    @property
    def preset(self) -> str | None:
        """Its name; None where a speed is asked for."""
        return None if self.amount is None else self.amount.preset

    def config(self, pipe: Any, steps: int, images: Sequence[Any], output: Size | None) -> SparseRef:
        """The configuration of a call.

        Parameters
        ----------
        pipe : diffusers pipeline
        steps : int
        images : sequence of PIL.Image.Image
            The references, of which those above a megapixel count as one.
        output : (int, int), optional
            Width and height in pixels; default 1024 x 1024.

        Raises
        ------
        ConfigError
            As `Amount.config`, and where the speed cannot be had.
        """
        if self.amount is not None:
            return self.amount.config(pipe.transformer, steps)
        assert self.speedup is not None
        cell = 2 * getattr(pipe, "vae_scale_factor", 8)
        sizes = [_encoded(image.size, cell) for image in images]
        return plan(pipe, self.speedup, references=sizes, output=output or (1024, 1024), steps=steps).config


def check_alone(options: argparse.Namespace) -> None:
    """Raise ConfigError where ``--speedup`` stands beside what it chooses."""
    if options.speedup is None:
        return
    told = [name for name in ("preset", "keep") if getattr(options, name) is not None] + list(settings(options))
    if told:
        raise ConfigError(f"--speedup chooses the setting and must stand alone, got --{told[0].replace('_', '-')} too")


def _encoded(size: Size, cell: int) -> Size:
    scale = min(1.0, (_MEGAPIXEL / (size[0] * size[1])) ** 0.5)
    width, height = (max(cell, int(side * scale) // cell * cell) for side in size)
    return width, height
