"""What a patch tells a selector of its model."""

from __future__ import annotations

from torch import nn

from ..adapters.base import Adapter
from ..adapters.model_words import model_words
from ..config import SparseRef
from ..selection import Selector

__all__ = ["check_selector"]


def check_selector(config: SparseRef, adapter: Adapter, transformer: nn.Module) -> None:
    """Raise ConfigError where the selector was trained for another model."""
    if isinstance(config.select, Selector):
        config.select.check(model_words(adapter, transformer))
