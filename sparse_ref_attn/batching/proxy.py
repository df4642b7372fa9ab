"""What stands in for the transformer in one item's pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["TransformerProxy"]


class TransformerProxy:
    """Stands in for the transformer in one item's pipeline: its calls wait for the others."""

    def __init__(self, transformer: nn.Module, ask: Callable[[Any], Any]) -> None:
        self._transformer, self._ask = transformer, ask

    @property  # type: ignore[misc]  # isinstance sees the transformer's class
    def __class__(self) -> Any:
        return type(self._transformer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask((args, kwargs, torch.is_grad_enabled()))

    def cache_context(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # a context of the model would be left while another item runs
