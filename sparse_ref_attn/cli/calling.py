"""The calls of a pipeline that commands make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError, SparseRefError

__all__ = ["caller"]


def caller(pipe: Any, arguments: dict[str, Any], seed: int) -> Callable[[int], Any]:
    """``call(steps) -> picture``, from the same noise every time; what diffusers refuses is the library's error."""

    def call(steps: int) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            return pipe(**arguments, num_inference_steps=steps, generator=generator).images[0]
        except (TypeError, ValueError) as error:  # how diffusers refuses a picture or an argument
            if isinstance(error, SparseRefError):
                raise
            raise ConfigError(f"{type(pipe).__name__} refused the call: {error}") from error

    return call
