"""Whether a call belongs to a run: seen without a sync in each step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RunIdentity"]


class RunIdentity:
    """What the calls of one run have in common.

    Other pipelines may run on the same transformer, before a run is over or after it was broken off.
    A run's text tokens are one tensor for all steps and one for each branch of guidance, so they tell its calls.

    Parameters
    ----------
    timed : bool
        Whether a step of the run has one timestep.
    """

    def __init__(self, timed: bool) -> None:
        self._timed = timed
        self._branches = 0
        self.timestep: Any = None
        """Of the last step that began."""
        self._texts: list[weakref.ref[Tensor]] = []
        self.stable = True
        """Whether each branch of guidance had one text so far, as far as was seen."""

    def knows(self, text: Tensor | None) -> bool:
        """Whether a call of the run had this very text."""
        return text is not None and any(known() is text for known in self._texts)

    @property
    def alive(self) -> bool:
        """Whether somebody still holds a text of the run, as its pipeline does to its end."""
        return any(known() is not None for known in self._texts)

    def agrees(self, calls: int, timestep: Any, text: Tensor | None, same_references: Callable[[], bool]) -> bool:
        """Whether a call is of this run, where its step has had `calls` so far.

        Another text calls for a comparison of the references; where texts are made anew in each step, they are not
        looked at again. Timestep and references are compared too when a step has more calls than any before it: one
        sync a run under sequential guidance, none without.
        """
        if calls == 0:
            self.timestep = timestep
            if text is None or not self.stable or self.knows(text):
                return True
            if self._texts and not same_references():
                return False
            self.stable = not self._texts
        elif calls > self._branches:
            timed = self._timed and timestep is not None
            if timed and not torch.equal(_of_item(timestep), _of_item(self.timestep)):
                return False
            if not same_references():
                return False
            self._branches = calls
        if text is not None and not self.knows(text):
            self._texts = [known for known in self._texts if known() is not None] + [weakref.ref(text)]
        return True


def _of_item(timestep: Any) -> Tensor:
    """A timestep; of times by row those of the first item, as branches of guidance may be of one item or of two."""
    timestep = torch.as_tensor(timestep)
    return timestep[0] if timestep.ndim > 1 else timestep
