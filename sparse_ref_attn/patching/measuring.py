"""Attention of a call, measured while it runs."""

from __future__ import annotations

from torch import Tensor

from ..errors import IncompatibleError
from ..hooks.diffusers import eager_blocks, splits_the_sequence
from .call import GenerationCall

__all__ = ["listen"]


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

    def tap(block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        if not call.run.profile.measures(call.at.step, block):
            return
        view = call.adapter.view(call.layout, q.detach(), k.detach(), v.detach(), mask)
        if view is not None:
            call.run.observe(call.at.step, block, view)

    call.listening.enter_context(eager_blocks(call.module))
    call.listening.enter_context(call.adapter.listen(call.module, tap))
