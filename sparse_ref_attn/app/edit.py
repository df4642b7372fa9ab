"""What one edit asks for, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import SparseRef
from ..errors import ConfigError
from ..estimation import at_share
from ..eval.ways import WAYS, family_of
from ..execution import EXECUTIONS
from ..refresh import named
from ..vocabulary import CHOSEN_PRESETS, DEFAULT_PRESET, SAME, chosen

__all__ = ["Edit"]


@dataclass(frozen=True)
class Edit:
    """One edit.

    Parameters
    ----------
    images : tuple of str
        Files of the references, at least one.
    prompt : str
    way : str
        One of `WAYS`.
    share : float, in (0, 1]
        Mean share of the reference tokens over all steps, a dense one included; of "cache" the share of the steps that
        run the references. No matter to the presets that keep every token.
    steps : int, optional
        Default the model's own.
    seed : int, in [0, 2**64)
    width, height : int, optional
        In pixels; one alone keeps the photo's shape, and so does neither.
    execute : str, optional
        "tokens", "cache" or "both"; default that of `way`.
    refresh : str
        With a cache, when the references run again: as `refresh.named`. Empty: the cache's own rule.

    Raises
    ------
    ConfigError
        For a setting outside its range, or no image or prompt.

    Examples
    --------
    >>> Edit(("cup.png",), "the cup on a beach", way="Edges", share=0.5).way
    'edges'
    """

    images: tuple[str, ...]
    prompt: str
    way: str = DEFAULT_PRESET
    share: float = 0.25
    steps: int | None = None
    seed: int = 0
    width: int | None = None
    height: int | None = None
    execute: str | None = None
    refresh: str = ""

    def __post_init__(self) -> None:
        if not self.images:
            raise ConfigError("there must be a photo, got none: drop one in")
        if not self.prompt.strip():
            raise ConfigError("there must be a prompt that says what to make of the photo, got none")
        object.__setattr__(self, "way", chosen("the rule", self.way, WAYS, SAME))
        if not 0 < self.share <= 1:
            raise ConfigError(f"the share must lie above 0 and up to 100 %, got {100 * self.share:g} %")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"there must be at least one step, got {self.steps}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"the seed must be a whole number in [0, 2**64), got {self.seed}")
        if self.execute is not None:
            object.__setattr__(self, "execute", chosen("the execution", self.execute, EXECUTIONS))
        self._settings()

    @property
    def words(self) -> str:
        """Rule and share; a preset that keeps every token has none."""
        return self.way if self.way in CHOSEN_PRESETS else f"{self.way} at {100 * self.share:g} %"

    def config(self, transformer: nn.Module, steps: int) -> SparseRef:
        """What the transformer is patched with for a run of `steps` steps.

        Raises
        ------
        ConfigError, IncompatibleError
            If the settings contradict each other, the steps with every token take more than the share, or the model
            cannot store references.
        """
        family = family_of(self.way, steps=steps, seed=self.seed, settings=self._settings())
        return at_share(transformer, family, self.share, steps)

    def _settings(self) -> dict[str, Any]:
        """Fields of `SparseRef` that were asked for."""
        found: dict[str, Any] = {} if self.execute is None else {"execute": self.execute}
        if self.refresh.strip():
            try:
                found["refresh"] = named(self.refresh)
            except ConfigError as error:
                raise ConfigError(f"the refresh is not clear: {error}") from None
        return found
