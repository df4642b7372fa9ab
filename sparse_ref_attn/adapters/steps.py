"""Which denoising step a transformer call belongs to, and which run."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..schedules import Clock

__all__ = ["ManualSteps", "ObservedSteps", "PipelineSteps", "RunStep"]

logger = logging.getLogger("sparse_ref_attn")


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
    """

    key: object
    step: int
    total: int
    clock: Callable[[int], Clock]


def _uniform(total: int) -> Callable[[int], Clock]:
    return lambda step: Clock.uniform(min(step, total - 1), total)


class PipelineSteps:
    """Reads the pipeline's scheduler: host integers only, and right under classifier-free guidance.

    Every run sets new timesteps, so the identity of that tensor is the identity of the run.
    """

    def __init__(self, pipe: Any, clock: str) -> None:
        self._pipe = weakref.ref(pipe)
        self._scheduler = pipe.scheduler
        self._clock = clock
        self._run: tuple[object, Callable[[int], Clock]] | None = None

    @staticmethod
    def reads(pipe: Any) -> bool:
        """Whether the pipeline's scheduler tells its step."""
        return hasattr(getattr(pipe, "scheduler", None), "step_index")

    def current(self, timestep: Tensor | None) -> RunStep:
        pipe = self._pipe()
        scheduler = self._scheduler if pipe is None else pipe.scheduler
        key = scheduler.timesteps
        first = getattr(scheduler, "begin_index", None) or 0
        total = len(key) - first
        index = scheduler.step_index
        if self._run is None or self._run[0] is not key:
            self._run = (key, self._make_clock(scheduler, first, total))
        return RunStep(key, 0 if index is None else index - first, total, self._run[1])

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
    """Told by the user: ``handle.begin(steps=...)`` and ``handle.step(i)``."""

    def __init__(self, total: int) -> None:
        if isinstance(total, bool) or not isinstance(total, int) or total < 1:
            raise ConfigError(f"steps must be an int of at least 1, got {total!r}")
        self._total = total
        self._step = 0

    def set(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < self._total:
            raise ConfigError(f"step must be an int in [0, {self._total}), got {step!r}")
        self._step = step

    def current(self, timestep: Tensor | None) -> RunStep:
        return RunStep(self, self._step, self._total, _uniform(self._total))


class ObservedSteps:
    """Watches the timestep of a bare transformer: one sync a call, said once.

    A lower timestep is the next step, the same one another branch of guidance, a higher one a new
    run. Progress is 1 - t / t_0.
    """

    def __init__(self) -> None:
        self._key: object = object()
        self._step = 0
        self._first = self._last = 0.0
        self._progress: dict[int, float] = {}
        self._told = False

    def restart(self) -> None:
        """The next call begins a run, whatever its timestep."""
        self._last = 0.0
        self._first = 0.0

    def current(self, timestep: Tensor | None) -> RunStep:
        if timestep is None:
            raise ConfigError("a bare transformer must be called with a timestep, or driven by handle.begin and step")
        if not self._told:
            self._told = True
            logger.warning(
                "the step is read from the timestep, one device sync a call; "
                "call handle.begin(steps=...) and handle.step(i) to avoid it"
            )
        t = float(torch.as_tensor(timestep).flatten()[0])
        if self._first == 0.0 or t > self._last:
            self._key, self._step, self._first, self._progress = object(), 0, t, {}
        elif t < self._last:
            self._step += 1
        self._last = t
        self._progress[self._step] = 1.0 - t / self._first if self._first else 0.0
        progress = dict(self._progress)
        return RunStep(
            self._key, self._step, 1000, lambda step: Clock(step, 1000, min(1.0, max(0.0, progress.get(step, 1.0))))
        )
