"""What hears the attention of a profiling step, with the LSE that came with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..profiling import AttentionView
from ..session import Session
from ..types import TokenLayout
from .base import Adapter

__all__ = ["Listener", "gives_lse", "view_with_lse"]

# diffusers' backends under which `attention_with_lse` finds the LSE of a call without a mask.
_LSE_BACKENDS = ("native", "_native_flash", "flash", "_flash_3")


class Listener:
    """A tap that measures the blocks and steps which the session asks for.

    Parameters
    ----------
    session : Session
    adapter : Adapter
    layout : TokenLayout
        Of the call.
    step : int
    """

    def __init__(self, session: Session, adapter: Adapter, layout: TokenLayout, step: int) -> None:
        self._session, self._adapter, self._layout, self._step = session, adapter, layout, step

    def wants_lse(self, block: int) -> bool:
        """Whether the call of `block` is measured, so that its LSE is worth asking for."""
        return self._session.profile.measures(self._step, block)

    def __call__(
        self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor | None = None
    ) -> None:
        if not self.wants_lse(block):
            return
        view = view_with_lse(self._adapter, self._layout, q.detach(), k.detach(), v.detach(), mask, lse)
        if view is not None:
            self._session.observe(self._step, block, view)


def view_with_lse(
    adapter: Adapter, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor | None
) -> AttentionView | None:
    """The adapter's view of a call (B, S, H, C), with each query's LSE (B, H, S) where there is one.

    The rows of the LSE are found as those of the queries are: it stands in their place with one channel.
    """
    view = adapter.view(layout, q, k, v, mask)
    if view is None or lse is None:
        return view
    rows = adapter.view(layout, lse.detach().transpose(1, 2)[..., None], k, v, mask)
    assert rows is not None
    generation, reference = (
        None if x is None else x[..., 0].transpose(1, 2) for x in (rows.generation, rows.reference)
    )
    return replace(view, lse=generation, reference_lse=reference)


def gives_lse(processor: Any) -> bool:
    """Whether a processor's attention is of a kind that says its LSE; None stands for PyTorch's own."""
    backend = getattr(processor, "_attention_backend", None)
    return backend is None or str(getattr(backend, "value", backend)) in _LSE_BACKENDS
