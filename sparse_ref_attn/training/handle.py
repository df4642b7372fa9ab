"""What the owner of a transformer patched for training holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..checks import is_int
from ..errors import ConfigError
from ..isolation import Isolation
from ..patching.patch import Patch
from ..report.page import plain
from ..types import RefSelection
from .draws import Draws
from .isolate_references import IsolateReferences
from .random_drop import RandomDrop

__all__ = ["TrainingHandle", "state_of"]


class TrainingHandle:
    """What `patch_for_training` returns: what was kept, the state of the draws, and the way back.

    It has ``state_dict`` and ``load_state_dict``, so that
    ``accelerator.register_for_checkpointing(handle)`` saves and restores its draws.
    """

    def __init__(self, draws: Draws, patch: Patch, drop: RandomDrop | IsolateReferences) -> None:
        self._draws, self._patch, self._drop = draws, patch, drop

    def __repr__(self) -> str:
        return f"TrainingHandle({self._draws.adapter.name}: {'removed' if self.removed else self.drop})"

    def _repr_html_(self) -> str:
        return plain(repr(self))

    @property
    def drop(self) -> RandomDrop | IsolateReferences:
        """The settings of the draws, or of the isolation."""
        return self._drop

    @property
    def isolation(self) -> Isolation | None:
        """How references run by themselves; None where they run with the picture."""
        return self._drop.isolation if isinstance(self._drop, IsolateReferences) else None

    @property
    def kept(self) -> tuple[RefSelection, ...]:
        """What the last call in training mode kept: one selection for the batch, or one for each item with
        ``per_sample=True``; none without references."""
        return self._draws.kept

    @property
    def removed(self) -> bool:
        """Whether the patch is off."""
        return self._patch.removed

    def state_dict(self) -> dict[str, int]:
        """Number of draws so far. A draw follows from the seed, the rank and its number alone, so that
        one process's state serves all of them."""
        return {"draws": self._draws.drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Raises
        ------
        ConfigError
            If it is no such state.
        """
        draws = state.get("draws")
        if set(state) != {"draws"} or not is_int(draws, 0):
            raise ConfigError(f"a training patch's state must be {{'draws': n}} with n >= 0, got {dict(state)}")
        self._draws.drawn = draws

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, calls of the transformer are those of the model without the patch, and nothing is drawn."""
        before, self._draws.paused = self._draws.paused, True
        try:
            yield
        finally:
            self._draws.paused = before

    def remove(self) -> None:
        """Take the patch off: the transformer is bit for bit what it was. Calling it again does nothing.

        Not between a forward and its backward where ``per_sample=True`` meets gradient checkpointing:
        blocks that run again then refuse their arguments.
        """
        self._patch.remove()


def state_of(handle: TrainingHandle | None) -> dict[str, Any]:
    """What a checkpoint says of the training patch, or of there being none."""
    isolation = None if handle is None else handle.isolation
    return {
        "draws": None if handle is None else handle.state_dict(),
        "isolate": None if isolation is None else isolation.to_dict(),
    }
