"""How long a transformer's calls are, and what has to be done where that changes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from ..hooks.compiled import compiled_blocks
from ..hooks.diffusers import reset_step_cache, step_cache_active
from ..hooks.foreign import ExplainedSizes, foreign_code

__all__ = ["Lengths"]

Explaining = AbstractContextManager[object]

Length = tuple[int, int]
"""Image rows of a call as it runs, and the reference tokens that take part in it (also as stored keys)."""


class Lengths:
    """The lengths of one patched transformer's calls: what a step cache has stored fits one of them."""

    def __init__(self) -> None:
        self._last: Length | None = None
        self._code: str | None = None

    def begin(self, module: nn.Module) -> None:
        """At the beginning of a generation: see what others put into the model's forward."""
        self._code = None if compiled_blocks(module) else foreign_code(module)  # a mode would be a guard of the graphs

    def enter(self, module: nn.Module, length: Length, measures: bool = False) -> Explaining:
        """Before a call: a step cache forgets what it has stored of another length, or where the call `measures`.

        Returns
        -------
        context manager
            For the call: where somebody's code in the forward may have stored activations of another length, errors
            about sizes are explained.

        Raises
        ------
        IncompatibleError, VersionError
            If the step cache cannot forget (see `reset_step_cache`).
        """
        last, self._last = self._last, length
        if step_cache_active(module):
            if last != length or measures:
                reset_step_cache(module)
            return nullcontext()
        if self._code is None or last is None or last[0] == length[0]:
            return nullcontext()
        return ExplainedSizes(
            f"{self._code} was put there by others and failed in the first call of {length[0]} image rows after calls "
            f"of {last[0]}, as a step cache does that keeps activations of the step before (TeaCache and the like). "
            "This library resets those of diffusers and of cache-dit and knows no others: use a kept count that never "
            "changes (schedules.Constant, and a selector that measures no attention), or take the cache off"
        )
