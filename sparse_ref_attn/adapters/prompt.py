"""The prompt of a call as one vector, for selectors that look at it."""

from __future__ import annotations

from torch import Tensor

from ..types import TokenLayout
from .base import Adapter, Kwargs

__all__ = ["prompt_of"]


def prompt_of(adapter: Adapter, kwargs: Kwargs, layout: TokenLayout) -> Tensor | None:
    """Mean of the text rows that a call gives the transformer, of the items that are scored.

    Returns
    -------
    Tensor, shape (B, E), float32
        None where the call has no text rows. Padding counts as it is given.

    Examples
    --------
    >>> import torch
    >>> text = torch.tensor([[[0.0, 2.0], [4.0, 2.0]]])
    >>> prompt_of(Adapter(), {"encoder_hidden_states": text}, TokenLayout(1, 2, (0, 1), ()))
    tensor([[2., 2.]])
    """
    text = None if adapter.text_tokens is None else kwargs.get(adapter.text_tokens)
    if not isinstance(text, Tensor) or text.ndim != 3 or not text.shape[1]:
        return None
    return text.detach()[layout.conditional or slice(None)].float().mean(1)
