"""The clock of one generation: where a denoising step lies between noise and image."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["Clock"]


@dataclass(frozen=True)
class Clock:
    """One denoising step, and how far the run has come.

    Parameters
    ----------
    index : int
        Step number in [0, steps), 0 first.
    steps : int
        Steps of the run, >= 1.
    progress : float
        ``1 - t / T`` in [0, 1]: 0 at the first, high-noise step (t = T), 1 at the last.

    Raises
    ------
    ConfigError
        If a field is outside its range.

    Notes
    -----
    Two clocks are in use and they give different budgets. `Clock.uniform` counts steps, and is the one every
    default and `Budget.mean_tokens` use. A clock made from a scheduler's sigmas (``progress = 1 - sigma``) runs slower
    at first under a resolution shift, and its last step lies before 1.

    Examples
    --------
    >>> [Clock.uniform(i, 5).progress for i in range(5)]
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    index: int
    steps: int
    progress: float

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.steps:
            raise ConfigError(f"a clock's index must lie in [0, steps), got step {self.index} of {self.steps}")
        if not 0.0 <= self.progress <= 1.0:
            raise ConfigError(f"progress must lie in [0, 1], got {self.progress}")

    @classmethod
    def uniform(cls, index: int, steps: int) -> Clock:
        """Step `index` of `steps` on the uniform clock: progress ``index / (steps - 1)``, 0 for a run of one step."""
        return cls(index, steps, index / (steps - 1) if steps > 1 else 0.0)
