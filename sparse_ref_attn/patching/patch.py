"""The hooks of one patched transformer."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any, Protocol

from torch import nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.shortened import Shortened
from ..errors import IncompatibleError
from ..hooks.diffusers import note_thread
from ..hooks.instance import InstanceHook
from .attendance import watch_parts
from .call import Call

__all__ = ["Patch", "Planner"]


class Planner(Protocol):
    """Who says what becomes of a call."""

    def call(self, module: nn.Module, kwargs: Kwargs) -> Call | None:
        """The call as it is to run; None where it runs as it is."""

    def install(self, transformer: nn.Module, undo: contextlib.ExitStack) -> None:
        """Hooks of its own, beside the patch's."""

    def went_past(self, module: nn.Module) -> None:
        """The transformer's parts ran without its own call."""

    def forget(self) -> None:
        """The patch is off: let go of what belongs to a run."""


class Patch:
    """Hooks that ask a planner what becomes of each call, and give the caller the output that it expects.

    Holds the model weakly, so that a patched pipeline can be freed.

    Parameters
    ----------
    transformer : nn.Module
    adapter : Adapter
    planner : Planner
    purpose : str
        A transformer is patched for one purpose at a time.
    """

    def __init__(self, transformer: nn.Module, adapter: Adapter, planner: Planner, purpose: str) -> None:
        self.transformer = weakref.ref(transformer)
        self.adapter, self.planner, self.purpose = adapter, planner, purpose
        self.removed = False
        self._running = threading.local()
        self._inside: dict[int, bool] = {}  # threads inside a call -> whether it must be alone
        self._undo = contextlib.ExitStack()

    def install(self) -> None:
        """Put the hooks on; everything that can be refused was refused before."""
        transformer = self.transformer()
        assert transformer is not None
        before, after = (InstanceHook(transformer, hook, self.purpose) for hook in (self._before, self._after))
        with contextlib.ExitStack() as undo:
            undo.callback(before.disarm)
            undo.callback(after.disarm)
            undo.callback(transformer.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(transformer.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
            for off in self.adapter.hooks(transformer, self._shortened):
                undo.callback(off)
            undo.callback(watch_parts(transformer, self._is_inside, self._past))
            self.planner.install(transformer, undo)
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Take everything off again. Safe to call twice, and in the middle of a run, between two calls."""
        self.removed = True
        self._close()
        self._undo.close()
        self.planner.forget()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[Any, ...], Kwargs] | None:
        if self._prepares:  # a call by which the library prepares another one
            return None
        self._close()
        self._enter(alone=False)
        call = self.planner.call(module, self.adapter.bind(module, args, kwargs))
        if call is None:
            return None
        self._running.call = call
        self._enter(call.execution.alone)
        self._running.prepares = True
        try:
            return (), call.enter()
        finally:
            self._running.prepares = False

    @property
    def _prepares(self) -> bool:
        """Whether this thread prepares a call."""
        return getattr(self._running, "prepares", False)

    def _enter(self, alone: bool) -> None:
        """Note that this thread is inside a call; refuse where blocks are, or would be, changed for another thread."""
        me = threading.get_ident()
        self._inside[me] = alone
        note_thread(inside=True)
        others = [flag for thread, flag in list(self._inside.items()) if thread != me]
        if any(others) or (alone and others):
            raise IncompatibleError(
                "where references leave by depth, or are stored beside compiled blocks, a transformer must be in one "
                "call at a time, got calls of two threads: give each a transformer of its own (copy.deepcopy), or drop "
                'at the input: from_block=0, profile="step"'
            )

    def _is_inside(self) -> bool:
        return threading.get_ident() in self._inside

    def _past(self) -> None:
        transformer = self.transformer()
        if transformer is not None:
            self.planner.went_past(transformer)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> Any:
        if self._prepares:
            return None
        self._inside.pop(threading.get_ident(), None)
        try:
            call = self._take()
            return None if call is None else call.leave(output)
        finally:
            note_thread(inside=False)

    def _shortened(self) -> Shortened | None:
        call: Call | None = getattr(self._running, "call", None)
        return None if call is None else call.shortened

    def _take(self) -> Call | None:
        call: Call | None = getattr(self._running, "call", None)
        self._running.call = None
        return call

    def _close(self) -> None:
        """Undo what a call that was broken off has left."""
        call = self._take()
        if call is not None:
            call.contexts.close()
