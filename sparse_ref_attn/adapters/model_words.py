"""A model in words: what a selector that was trained for one is told apart by."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .base import Adapter

__all__ = ["model_words"]


def model_words(adapter: Adapter, transformer: nn.Module) -> str:
    """The transformer's class and how many blocks of each kind it has; fine-tuning changes neither.

    Examples
    --------
    >>> model_words(Adapter(), nn.Linear(2, 2))
    'Linear'
    """
    kinds = Counter(site.kind for site in adapter.sites(transformer))
    blocks = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
    return type(transformer).__name__ + (f" of {blocks} blocks" if blocks else "")
