"""Attention of a call, measured while it runs."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..adapters.base import Adapter
from ..adapters.joint_order import ordered_view
from ..errors import IncompatibleError, LayoutError
from ..hooks.compiled import eager_blocks
from ..hooks.diffusers import splits_the_sequence
from ..run import AttentionView
from ..types import TokenLayout
from .call import GenerationCall

__all__ = ["listen", "view_with_lse"]


class _Listener:
    """Measures the attention calls of one transformer call that look over all its rows.

    A block may attend to other keys too, as an IP-Adapter's does to those of its image prompt: such calls pass by.
    """

    def __init__(self, call: GenerationCall) -> None:
        self._call = call
        self._joint: set[int] = set()
        self._others: dict[int, LayoutError] = {}
        sites = call.adapter.sites(call.module)
        orders = {kind: call.adapter.order(call.kwargs, call.layout, kind) for kind in {site.kind for site in sites}}
        self._orders = [orders[site.kind] for site in sites]

    def wants_lse(self, block: int) -> bool:
        """Whether the call of `block` is measured, so that its LSE is worth asking for."""
        return self._call.run.profile.measures(self._call.at.step, block)

    def __call__(
        self, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor | None = None
    ) -> None:
        call = self._call
        if not self.wants_lse(block):
            return
        try:
            q, k, v = (x.detach() for x in (q, k, v))
            view = view_with_lse(call.adapter, call.layout, q, k, v, mask, lse, self._orders[block])
        except LayoutError as error:
            if block not in self._joint and q.shape[1] == k.shape[1]:
                raise
            self._others[block] = error
            return
        self._joint.add(block)
        if view is not None:
            call.run.observe(call.at.step, block, view)

    def check(self) -> None:
        """After the call: raise LayoutError where a block attended to other keys and never to all rows."""
        for block, error in self._others.items():
            if block not in self._joint:
                raise LayoutError(f"block {block} must attend over all rows to be measured: {error}") from error


def listen(call: GenerationCall) -> None:
    """Measure the attention of a call that measures, until ``call.listening`` is left; compiled blocks run eagerly.

    Raises
    ------
    IncompatibleError
        Under context parallelism.
    """
    if not call.measures:
        return
    if splits_the_sequence(call.module):
        raise IncompatibleError(
            "attention cannot be measured under context parallelism, where each process sees its own part of the "
            "rows: use a selector and a budget that need none (edges, grid, a SavedRanking of a run in one "
            "process), or call disable_parallelism()"
        )
    call.listening.enter_context(eager_blocks(call.module))
    listener = _Listener(call)
    call.heard = listener.check
    call.listening.enter_context(call.adapter.listen(call.module, listener))


def view_with_lse(
    adapter: Adapter,
    layout: TokenLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lse: Tensor | None,
    order: Tensor | None = None,
) -> AttentionView | None:
    """The adapter's view of a call (B, S, H, C) in `order`, with each query's LSE (B, H, S) where there is one.

    The rows of the LSE are found as those of the queries are: it stands in their place with one channel.
    """
    view = ordered_view(adapter, order, layout, q, k, v, mask)
    if view is None or lse is None:
        return view
    rows = ordered_view(adapter, order, layout, lse.detach().transpose(1, 2)[..., None], k, v, mask)
    assert rows is not None
    generation, reference = (
        None if x is None else x[..., 0].transpose(1, 2) for x in (rows.generation, rows.reference)
    )
    return replace(view, lse=generation, reference_lse=reference)
