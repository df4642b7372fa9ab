"""Which steps of one run compute its references anew, as it goes along."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from ..refresh import Drift, Refresh, standard

__all__ = ["Refreshing"]

UNKNOWN = 1000  # steps of a run that does not tell how many it has, for what counts in steps


class Refreshing:
    """Says whether a step is full; nothing is stored before the first one.

    Parameters
    ----------
    refresh : Refresh, optional
        Default `refresh.standard`.
    total : int, optional
        Steps of the run, where they are known.
    isolated : bool
        Whether the references run by themselves: no step is full.

    Raises
    ------
    ConfigError
        If `refresh` counts in shares of a run whose number of steps is not known.

    Examples
    --------
    >>> import torch
    >>> from sparse_ref_attn.refresh import Drift
    >>> steps = Refreshing(Drift(0.2, at_least_every=9), 28)
    >>> for step in range(12):
    ...     if steps.due(step):
    ...         steps.computed(step, torch.tensor([0.05]) if step else None)
    >>> steps.full
    [0, 1, 5]
    """

    def __init__(self, refresh: Refresh | None, total: int | None, isolated: bool = False) -> None:
        self.isolated = isolated
        if not isolated and total is None and refresh is not None and refresh.needs_total:
            raise ConfigError(
                f"a refresh that counts in shares of a run needs the run's number of steps, got {refresh} in a loop "
                "that does not tell it: call handle.begin(steps=...) and handle.step(i), count in steps, or take "
                '"faithful" or "fast"'
            )
        self._refresh, self._total = refresh, total
        self.full: list[int] = []
        """Full steps so far."""
        self._next = 0

    @property
    def refresh(self) -> Refresh:
        """What the run goes by."""
        return standard(self._total) if self._refresh is None else self._refresh

    @property
    def _steps(self) -> int:
        return UNKNOWN if self._total is None else self._total

    def due(self, step: int) -> bool:
        """Whether `step` is full."""
        if self.isolated:
            return False
        if not self.full or step in self.full:
            return True
        if isinstance(self.refresh, Drift):
            return step >= self._next
        return any(self.full[-1] < at <= step for at in self.refresh.steps(self._steps))

    def computed(self, step: int, drift: Tensor | None) -> None:
        """Step `step` was full; K/V moved by `drift` (layers,) since the last one (synced for `Drift` alone)."""
        if step in self.full:
            return
        last, refresh = self.full[-1] if self.full else step, self.refresh
        self.full.append(step)
        if isinstance(refresh, Drift):
            known = drift is not None and step > last
            wait = refresh.wait(float(drift.max()), step - last, self._steps) if known and drift is not None else 1
            self._next = step + wait
