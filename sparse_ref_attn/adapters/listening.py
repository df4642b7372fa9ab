"""What a profiling step hears: the joint attention of each block, and nothing else that the block asks beside it."""

from __future__ import annotations

from torch import Tensor

from ..errors import LayoutError
from ..session import Session
from ..types import TokenLayout
from .base import Adapter

__all__ = ["Listener"]


class Listener:
    """Measures the attention calls of one transformer call that look over all its rows.

    A block may attend to other keys too, as an IP-Adapter's does to those of its image prompt: such calls pass by.

    Parameters
    ----------
    session : Session
    adapter : Adapter
    layout : TokenLayout
    step : int
    """

    def __init__(self, session: Session, adapter: Adapter, layout: TokenLayout, step: int) -> None:
        self._session, self._adapter, self._layout, self._step = session, adapter, layout, step
        self._joint: set[int] = set()
        self._others: dict[int, LayoutError] = {}

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """One call of block `block`, q, k, v (B, S, H, C) after RoPE."""
        if not self._session.profile.measures(self._step, block):
            return
        try:
            view = self._adapter.view(self._layout, q.detach(), k.detach(), v.detach(), mask)
        except LayoutError as error:
            if block not in self._joint and q.shape[1] == k.shape[1]:
                raise
            self._others[block] = error
            return
        self._joint.add(block)
        if view is not None:
            self._session.observe(self._step, block, view)

    def check(self) -> None:
        """After the call: raise LayoutError where a block attended to other keys and never to all rows."""
        for block, error in self._others.items():
            if block not in self._joint:
                raise LayoutError(f"block {block} must attend over all rows to be measured: {error}") from error
