"""Attention of other rows to the image stream, as that of sound is: it too reads what was stored of the references."""

from __future__ import annotations

import torch
from torch import Tensor

from ...hooks.diffusers import Attention, Route

__all__ = ["Onlookers"]


class Onlookers:
    """Keys and values of the references in such attention, for one branch of guidance, in the order of the tokens."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(x.numel() * x.element_size() for pair in self._rows.values() for x in pair)

    def bytes_of(self, tokens: int) -> int:
        """Bytes that so many tokens would take."""
        return sum(2 * tokens * k[:, :1].numel() * k.element_size() for k, _ in self._rows.values())

    def storing(self, whole: slice | Tensor) -> Route:
        """Attention of a full call, whose rows `whole` are references'."""

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            self._rows[i] = k.detach()[:, whole].clone(), v.detach()[:, whole].clone()
            return own()

        return attend

    def reading(self, kept: Tensor | None) -> Route:
        """Attention of a call without references, to its own rows and the stored ones `kept`; None: all of them."""

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
            stored = self._rows[i] if kept is None else [x.index_select(1, kept.to(x.device)) for x in self._rows[i]]
            keys, values = (torch.cat(pair, 1) for pair in zip((k, v), stored, strict=True))
            return own(keys, values, mask)

        return attend

    def clear(self) -> None:
        """Forget them."""
        self._rows.clear()
