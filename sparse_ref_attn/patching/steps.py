"""Which denoising step a transformer call belongs to, and which run."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ..checks import is_int
from ..errors import ConfigError
from ..schedules import Clock

__all__ = ["ManualSteps", "ObservedSteps", "PipelineSteps", "RunStep"]

_MOST_STEPS = 100_000  # a budget is asked for each of them


@dataclass(frozen=True)
class RunStep:
    """Where a call stands.

    Parameters
    ----------
    key : object
        Identity of the run: another object means another run.
    step, total : int
        Step number from 0, and how many the run has (a guess of 1,000 where nobody knows).
    clock : callable
        From a step number to the clock that budgets read.
    observed : bool
        Whether step and run are concluded from the timestep, so that the references must be compared.
    """

    key: object
    step: int
    total: int
    clock: Callable[[int], Clock]
    observed: bool = False


def _uniform(total: int) -> Callable[[int], Clock]:
    return lambda step: Clock.uniform(min(step, total - 1), total)


class _SetTimesteps:
    """Stands in for ``scheduler.set_timesteps``; in a copy or a pickle of the scheduler it is what it stood in for."""

    def __init__(self, scheduler: Any, told: Callable[[], None]) -> None:
        self.scheduler, self.told = weakref.ref(scheduler), told
        self.earlier = vars(scheduler).get("set_timesteps")
        self.thread: int | None = None
        self.count = 0
        functools.update_wrapper(self, scheduler.set_timesteps, updated=())  # pipelines look at its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scheduler: Any = self.scheduler()
        self.thread, self.count = get_ident(), self.count + 1
        self.told()
        if self.earlier is not None:
            return self.earlier(*args, **kwargs)
        return type(scheduler).set_timesteps(scheduler, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A copy is asked for its method before it has a state of its own: that is the class's.
        return (getattr, (self.scheduler(), "set_timesteps")) if self.earlier is None else (_same, (self.earlier,))


def _same(call: Callable[..., Any]) -> Callable[..., Any]:
    return call


class PipelineSteps:
    """Reads the pipeline's scheduler: host integers only, and right under classifier-free guidance.

    Every run sets new timesteps, so the identity of that tensor is the identity of the run.
    """

    def __init__(self, pipe: Any, clock: str) -> None:
        self._pipe = weakref.ref(pipe)
        self._scheduler = pipe.scheduler
        self._clock = clock
        self._run: tuple[object, Callable[[int], Clock]] | None = None
        self._begun: _SetTimesteps | None = None

    @staticmethod
    def reads(pipe: Any) -> bool:
        """Whether the pipeline's scheduler tells its step."""
        return hasattr(getattr(pipe, "scheduler", None), "step_index")

    def run(self) -> object:
        """The identity of the scheduler's run, None where it is idle (never set, or at its end)."""
        pipe = self._pipe()
        if pipe is not None:
            self._scheduler = pipe.scheduler
        scheduler = self._scheduler
        timesteps, index = scheduler.timesteps, scheduler.step_index
        idle = getattr(scheduler, "num_inference_steps", None) is None or (index or 0) >= len(timesteps)
        return None if idle else timesteps

    def current(self, timestep: Tensor | None) -> RunStep:
        key, scheduler = self.run(), self._scheduler
        first = getattr(scheduler, "begin_index", None) or 0
        total = len(scheduler.timesteps) - first
        index = scheduler.step_index
        if self._run is None or self._run[0] is not key:
            self._run = (key, self._make_clock(scheduler, first, total))
        return RunStep(key, 0 if index is None else index - first, total, self._run[1])

    @property
    def begun(self) -> int:
        """How often the scheduler was set while it was listened to."""
        return 0 if self._begun is None else self._begun.count

    def is_here(self) -> bool:
        """Whether the scheduler's run was begun in this thread, as far as is known."""
        begun = self._begun
        return begun is None or begun.scheduler() is not self._scheduler or begun.thread in (None, get_ident())

    def listen(self, told: Callable[[], None]) -> Callable[[], None]:
        """Note from now on which thread begins each run, and tell of it; returns what ends it."""
        self._begun = begun = _SetTimesteps(self._scheduler, told)
        self._scheduler.set_timesteps = begun

        def stop() -> None:
            scheduler: Any = begun.scheduler()
            outer = None if scheduler is None else vars(scheduler).get("set_timesteps")
            if outer is begun:
                if begun.earlier is None:
                    del scheduler.set_timesteps
                else:
                    scheduler.set_timesteps = begun.earlier
            while isinstance(outer, _SetTimesteps):  # of a patch that replaces this one
                if outer.earlier is begun:
                    outer.earlier = begun.earlier
                outer = outer.earlier
            self._begun = None

        return stop

    def _make_clock(self, scheduler: Any, first: int, total: int) -> Callable[[int], Clock]:
        if self._clock == "steps":
            return _uniform(total)
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None:
            raise ConfigError(f'clock="sigma" needs a scheduler with sigmas, got {type(scheduler).__name__}')
        values = torch.as_tensor(sigmas).tolist()[first : first + total]
        top = values[0] or 1.0
        return lambda step: Clock(step, total, min(1.0, max(0.0, 1.0 - values[min(step, total - 1)] / top)))


class ManualSteps:
    """Told by the user: ``handle.begin(steps=...)`` and ``handle.step(i)``. A lower step is a new run."""

    def __init__(self, total: int) -> None:
        if not is_int(total, 1) or total > _MOST_STEPS:
            raise ConfigError(f"steps must be an int in 1..{_MOST_STEPS}, got {total!r}")
        self._total = total
        self._step = 0
        self._key = object()

    def set(self, step: int) -> None:
        if not is_int(step, 0) or step >= self._total:
            raise ConfigError(f"step must be an int in [0, {self._total}), got {step!r}")
        if step < self._step:
            self._key = object()
        self._step = step

    def run(self) -> object:
        return self._key

    def current(self, timestep: Tensor | None) -> RunStep:
        return RunStep(self._key, self._step, self._total, _uniform(self._total))

    def restart(self) -> None:
        """The next call begins a run, in the same step."""
        self._key = object()


class ObservedSteps:
    """Watches the timestep of one generation's calls: one sync a call.

    A lower timestep is the next step, the same one another branch of guidance, a higher one a new
    run. Progress is 1 - t / t_0.

    Parameters
    ----------
    timestep : Tensor, optional
        Of the last call of a run that somebody else told the steps of so far.
    step : int
        Its step.
    """

    def __init__(self, timestep: Tensor | None = None, step: int = 0) -> None:
        self._key: object = object()
        self._step = step
        self._first = None if timestep is None else _number(timestep)
        self._last = self._first or 0.0
        self._progress: dict[int, float] = {}
        self.rising = False
        """Whether the run's timesteps rise, as an inversion's do."""

    @property
    def key(self) -> object:
        """The identity of the run."""
        return self._key

    def rises(self, timestep: Tensor | None) -> bool:
        """Whether a call's timestep lies above the last one."""
        return self._first is None or _number(timestep) > self._last

    def follows(self, timestep: Tensor | None) -> bool:
        """Whether a call's timestep is that of a later step of the run."""
        t = _number(timestep)
        return self._first is not None and t != self._last and (t > self._last) == self.rising

    def current(self, timestep: Tensor | None, goes_on: bool = False) -> RunStep:
        """The step of a call; `goes_on`: it is known to have the text and references of the one before."""
        t = _number(timestep)
        if self._first is not None and goes_on and self._step == 0 and t > self._last:
            self.rising = True
        if self._first is None or (t != self._last and (t > self._last) != self.rising):
            self._key, self._step, self._first, self._progress, self.rising = object(), 0, t, {}, False
        elif t != self._last:
            self._step += 1
        self._last = t
        self._progress[self._step] = 1.0 - t / self._first if self._first else 0.0
        progress = self._progress  # of this run, and growing with it
        return RunStep(
            self._key,
            self._step,
            1000,
            lambda step: Clock(step, 1000, min(1.0, max(0.0, progress.get(step, 1.0)))),
            observed=True,
        )


def _number(timestep: Tensor | None) -> float:
    if timestep is None:
        raise ConfigError("a bare transformer must be called with a timestep, or driven by handle.begin and step")
    return float(torch.as_tensor(timestep).flatten()[0])
