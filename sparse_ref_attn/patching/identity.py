"""Whether a call belongs to the run that the scheduler tells of: seen without a sync in each step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RunIdentity"]


class RunIdentity:
    """What the calls of one run have in common.

    Another pipeline may run on the same transformer with a scheduler of its own, after a run of the
    patched one that was broken off: then the scheduler being read stands still in the middle of a run.

    Parameters
    ----------
    timed : bool
        Whether a step of the run has one timestep.
    """

    def __init__(self, timed: bool) -> None:
        self._timed = timed
        self._branches = 0
        self._timestep: Any = None
        self._text: weakref.ref[Tensor] | None = None
        self._begun = False

    def agrees(self, calls: int, timestep: Any, text: Tensor | None, same_references: Callable[[], bool]) -> bool:
        """Whether a call is of this run, where its step has had `calls` so far.

        A run's text tokens are one tensor for all steps, so another tensor calls for a comparison of
        the references; where they are made anew in each step, they are not looked at again. Timestep
        and references are compared too when a step has more calls than any before it: one sync a run
        under sequential guidance, none without.
        """
        if calls == 0:
            self._timestep = timestep
            return self._is_text(text) or same_references()
        if calls <= self._branches:
            return True
        timed = self._timed and timestep is not None
        if timed and not torch.equal(torch.as_tensor(timestep), torch.as_tensor(self._timestep)):
            return False
        self._branches = calls
        return same_references()

    def _is_text(self, text: Tensor | None) -> bool:
        if not self._begun:
            self._begun = True
            self._text = None if text is None else weakref.ref(text)
        same = self._text is None or self._text() is text
        if not same:
            self._text = None
        return same
