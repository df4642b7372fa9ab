"""Which branch of guidance a call of a run is of: each stores, and reads, keys and values of its own."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .onlookers import Onlookers

__all__ = ["Branch", "Branches", "Held"]


class Held(Protocol):
    """What one branch has stored of the references."""

    layers: int
    tokens: Tensor | None
    """Reference tokens that are held, ascending; None for all."""
    idle: frozenset[int]
    """Layers that do not attend in the branch's calls."""
    moved: dict[int, Tensor]
    """How far the rows of each layer moved when they were last taken anew."""

    @property
    def complete(self) -> bool:
        """Whether the rows of every layer that attends were taken."""

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""

    @property
    def bytes_of_all(self) -> int:
        """Bytes that the rows of every reference token would take."""


class Branch:
    """What the calls of one branch of guidance have stored; None until a full call has come to its end."""

    def __init__(self) -> None:
        self.held: Held | None = None
        self.onlookers = Onlookers()

    def forget(self) -> None:
        """Hold nothing."""
        self.held = None
        self.onlookers.clear()


class _Text:
    """One text of a run, and the branches whose calls bring it: the first such call of a step, the second, ..."""

    def __init__(self, text: Tensor | None) -> None:
        self._known = None if text is None else weakref.ref(text)  # held by its pipeline alone (see RunIdentity)
        self._values = None if text is None else text.detach().clone()
        self.branches: list[Branch] = []
        self._step, self._calls = -1, 0

    def is_(self, text: Tensor | None) -> bool:
        """Whether it is this very tensor."""
        return text is None if self._known is None else self._known() is text

    def equals(self, text: Tensor | None) -> bool:
        """Whether it is one of the same values (syncs)."""
        values = self._values
        if values is None or text is None:
            return values is text
        return (values.shape, values.device) == (text.shape, text.device) and torch.equal(values, text)

    def branch(self, step: int) -> Branch:
        """Of the next call in `step`."""
        if self._step != step:
            self._step, self._calls = step, 0
        self._calls += 1
        while len(self.branches) < self._calls:
            self.branches.append(Branch())
        return self.branches[self._calls - 1]


class Branches:
    """Those of one run: a call is known by its text, and by how often that came in its step."""

    def __init__(self) -> None:
        self._texts: list[_Text] = []
        self.shared = Branch()
        """What references that run by themselves stored, for the calls of every branch."""

    def __iter__(self) -> Iterator[Branch]:
        if self.shared.held is not None:
            yield self.shared
        for text in self._texts:
            yield from text.branches

    def of(self, step: int, text: Tensor | None) -> Branch:
        """Of the next call in `step`, with that text (syncs where texts are made anew for each call)."""
        known = self._texts
        found = next((t for t in known if t.is_(text)), None) or next((t for t in known if t.equals(text)), None)
        if found is None:
            known.append(found := _Text(text))
        return found.branch(step)
