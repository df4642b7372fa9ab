"""Whether the runs since a patch went through the patched transformer's own call."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..hooks.instance import InstanceHook, is_patched

__all__ = ["PARTS", "Attendance", "watch_parts"]

logger = logging.getLogger("sparse_ref_attn")

PARTS = (
    "the parts of the patched transformer ran without its own call (a codebase that runs a model through a function "
    "of its parts, or its forward past the hooks): nothing was dropped there. Call transformer(...)"
)
_REPLACED = "pipe.transformer is another one than the transformer that was patched: patch again"


def watch_parts(transformer: nn.Module, inside: Callable[[], bool], past: Callable[[], None]) -> Callable[[], None]:
    """Tell `past` when the transformer's last layer runs while no call of it is `inside`; returns what ends it.

    Compiled code that has that layer in its graph is not told of: a hook there would break the graph.

    Examples
    --------
    >>> model, seen = nn.Sequential(nn.ModuleList(), nn.Linear(2, 2)), []
    >>> end = watch_parts(model, inside=lambda: False, past=lambda: seen.append("past"))
    >>> _ = model[1](torch.zeros(1, 2))
    >>> end()
    >>> _ = model[1](torch.zeros(1, 2))
    >>> seen
    ['past']
    """
    last = _last_layer(transformer)
    if last is None:
        return lambda: None

    def look(*arguments: Any) -> None:
        again = torch._C._current_graph_task_id() != -1  # a checkpointed part, in the backward
        if not inside() and not again:
            past()

    hook = InstanceHook(last, look, traced=False)
    handle = last.register_forward_pre_hook(hook)

    def end() -> None:
        hook.disarm()
        handle.remove()

    return end


def _last_layer(transformer: nn.Module) -> nn.Module | None:
    """The layer that makes the prediction: diffusers' ``proj_out``, otherwise the last child with weights after the
    blocks."""
    known = getattr(transformer, "proj_out", None)
    if isinstance(known, nn.Module):
        return known
    after: list[nn.Module] | None = None
    for child in transformer.children():
        if isinstance(child, nn.ModuleList):
            after = []
        elif after is not None and next(child.parameters(), None) is not None:
            after.append(child)
    return after[-1] if after else None


class Attendance:
    """Which runs a patched transformer has seen, and which must have gone past it.

    Parameters
    ----------
    transformer : nn.Module
    pipe : diffusers pipeline, optional
    runs : callable
        How often the pipeline's scheduler was set since the patch.
    """

    def __init__(self, transformer: nn.Module, pipe: Any, runs: Callable[[], int]) -> None:
        self._transformer = weakref.ref(transformer)
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._runs = runs
        self._heard = self._calls = 0
        self._served = False
        self.passed: str | None = None
        """What went past the patch since a run with references last began, in words."""
        self._said: set[str] = set()

    def came(self) -> None:
        """The transformer was called."""
        self._calls, self._heard = self._calls + 1, self._runs()

    def began(self) -> None:
        """A run began that has a report, here or with a batch."""
        self.passed, self._served = None, True

    def went_past(self, what: str = PARTS) -> None:
        """Something ran past the patch: said at once, the first time."""
        self.passed = what
        self.say(what)

    def scheduled(self) -> bool:
        """The pipeline's scheduler was set for a run; whether that run is seen to go past the patch."""
        replaced = self._replaced()
        if replaced:
            self.went_past(_REPLACED)
        for name in self._beside():
            self.say(
                f"pipe.{name} is a transformer beside the one that is patched, and runs dense: patch(pipe.{name}) too"
            )
        return replaced

    def doubt(self) -> str | None:
        """Why the last report may not be that of the last run, in words; None where nothing speaks for that."""
        if self._replaced():
            return _REPLACED
        runs = self._runs() - self._heard
        if runs > 0:
            return (
                f"the pipeline's scheduler was set {runs} times since the patched transformer was last called: such a "
                "run did not go through the transformer's own call (some codebases run a model through a function of "
                "its parts), so nothing was dropped in it"
            )
        return None

    def why_nothing(self) -> str:
        """Why there is no report, in words."""
        why = self.passed or self.doubt()
        if why is not None:
            return why
        if self._calls:
            return (
                "the calls since the patch had no reference tokens (rows of another frame than the generation's, or "
                "of a grid that starts anew)"
            )
        return "the transformer was not called since the patch"

    def leave(self) -> None:
        """The patch is taken off: say what was not said of runs in which it did nothing."""
        doubt = self.doubt()
        if doubt is not None:
            self.say(doubt)
        elif not self._served and not self._said:
            self.say(f"the patch never dropped a token: {self.why_nothing()}")

    def say(self, what: str) -> None:
        """Log it, once."""
        kind = what.split(" was set ")[0]  # not for each number of runs
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s", what)

    def _known(self) -> tuple[Any, nn.Module | None]:
        return None if self._pipe is None else self._pipe(), self._transformer()

    def _replaced(self) -> bool:
        pipe, own = self._known()
        used = getattr(pipe, "transformer", None)
        return isinstance(used, nn.Module) and not any(module is own for module in used.modules())

    def _beside(self) -> list[str]:
        """Names of the pipeline's other transformers of the class that nobody patched."""
        pipe, own = self._known()
        parts = {name: m for name, m in getattr(pipe, "__dict__", {}).items() if isinstance(m, nn.Module)}
        others = {name: m for name, m in parts.items() if type(m) is type(own) and m is not own}
        return [name for name, m in others.items() if name != "transformer" and not is_patched(m)]
