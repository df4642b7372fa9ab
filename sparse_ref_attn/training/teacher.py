"""What a model predicted before it was trained, which its training may go by."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..hooks.diffusers import applied_loras
from .handle import TrainingHandle

__all__ = ["Teacher"]


class Teacher:
    """A transformer as it is now, before it is trained, on every reference token.

    Parameters
    ----------
    transformer : torch.nn.Module
        With a LoRA the model is the same one without it, else a copy, which takes as much memory again.
    handle : TrainingHandle, optional
        Of the patch that it is trained under, which is off while it is asked.
    """

    def __init__(self, transformer: Any, handle: TrainingHandle | None = None) -> None:
        self._lora = bool(applied_loras(transformer))
        self._model = transformer if self._lora else copy.deepcopy(transformer).eval().requires_grad_(False)
        self._handle = handle if self._lora else None

    def __call__(self, arguments: Mapping[str, Any]) -> Tensor:
        """Its output, (B, N + R, D), without gradients.

        Parameters
        ----------
        arguments : mapping
            Of the transformer's call, with ``return_dict`` false.
        """
        with torch.no_grad(), self._untrained():
            output: Tensor = self._model(**arguments)[0]
            return output

    @contextlib.contextmanager
    def _untrained(self) -> Iterator[None]:
        if not self._lora:
            yield
            return
        with contextlib.nullcontext() if self._handle is None else self._handle.paused():
            self._model.disable_adapters()
            try:
                yield
            finally:
                self._model.enable_adapters()
