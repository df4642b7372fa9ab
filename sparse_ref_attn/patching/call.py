"""One transformer call on its way from the pre-hook to the post-hook."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.shortened import Shortened
from ..record import StepRecord
from ..run import Plan, Run
from ..timing import Stopwatch, Stopwatches
from ..types import TokenLayout
from .steps import RunStep

__all__ = ["Call", "Execution", "GenerationCall"]


class Execution(Protocol):
    """A way to save work in one call; made for the call, so it may keep what `after` needs."""

    alone: bool
    """Whether the model's modules are changed meanwhile, so that no other call may run."""

    def before(self, call: Any) -> Kwargs:
        """The arguments that the transformer gets. What must be undone goes to ``call.contexts``."""

    def after(self, call: Any, output: Any) -> Any:
        """The output that the caller gets."""


@dataclass
class Call:
    """What is known of a call.

    Parameters
    ----------
    adapter : Adapter
    module : nn.Module
        The transformer.
    kwargs : dict
        Arguments by name, as the caller gave them.
    layout : TokenLayout
        Of these arguments; of the run's first call where reference rows are left out.
    plan : Plan
    execution : Execution
    shortened : Shortened, optional
        Set where the image stream was cut or changed.
    contexts : ExitStack
        Left when the call is over.
    """

    adapter: Adapter
    module: nn.Module
    kwargs: Kwargs
    layout: TokenLayout
    plan: Plan
    execution: Execution
    shortened: Shortened | None = None
    contexts: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def device(self) -> torch.device:
        return self.kwargs[self.adapter.tokens].device

    def enter(self) -> Kwargs:
        """The arguments that the transformer gets."""
        return self.execution.before(self)

    def leave(self, output: Any) -> Any:
        """The output that the caller gets; None, and nothing but undoing, where the transformer raised."""
        self.contexts.close()
        return None if output is None else self.execution.after(self, output)


@dataclass(kw_only=True)
class GenerationCall(Call):
    """A call of a run.

    Parameters
    ----------
    run : Run
    at : RunStep
    step : StepRecord
        Of the call's step; every call of it writes there.
    began : float
        ``time.perf_counter()`` when the library was first asked.
    measures : bool
        Whether the attention of this call is to be measured.
    listening : ExitStack
        Left when the measuring is over, at the latest with the call.
    heard : callable
        Called after the call: raises where what was measured was not the joint attention.
    watch : Stopwatch, optional
        Of the transformer; set when it begins.
    ahead : Stopwatch, optional
        Of what the transformer ran for this call before it.
    around : context manager, optional
        For the transformer's own forward: explains errors in it, or counts what torch compiles.
    """

    run: Run
    at: RunStep
    step: StepRecord
    began: float
    measures: bool = False
    listening: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    heard: Callable[[], None] = lambda: None
    watch: Stopwatch | None = None
    ahead: Stopwatch | None = None
    around: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)

    def enter(self) -> Kwargs:
        self.contexts.enter_context(self.listening)
        kwargs = super().enter()
        if self.step.calls == 0:
            self.step.seconds = Stopwatches()
        self.step.calls += 1
        self.step.host_seconds += time.perf_counter() - self.began
        self.contexts.enter_context(self.around)
        self.watch = Stopwatch(self.device)
        return kwargs

    def leave(self, output: Any) -> Any:
        if self.watch is not None:
            self.watch.stop(self.device)
        began = time.perf_counter()
        self.contexts.close()
        if output is not None:
            self.heard()
        given = super().leave(output)
        if output is not None:
            if self.watch is not None and isinstance(self.step.seconds, Stopwatches):
                self.step.seconds += [self.watch] if self.ahead is None else [self.ahead, self.watch]
            self.step.host_seconds += time.perf_counter() - began
        return given
