"""The rows of one transformer call."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..types import TokenLayout

__all__ = ["StepTokens"]


@dataclass(frozen=True)
class StepTokens:
    """Rows of one transformer call, per batch item.

    Parameters
    ----------
    text : int
        Text tokens (T), padding included.
    generation : int
        Tokens being denoised (G).
    references : int
        Reference rows in the image stream (R on a dense step, K on a sparse one).
    cached : int
        Reference tokens attended as stored keys and values, without rows of their own.
    split : bool
        References attend to themselves only, text and generation to everything: the extract step of a reference
        K/V cache.

    Raises
    ------
    ConfigError
        If a count is negative, or a split step also has cached tokens.
    """

    text: int
    generation: int
    references: int
    cached: int = 0
    split: bool = False

    def __post_init__(self) -> None:
        if min(self.text, self.generation, self.references, self.cached) < 0 or (self.split and self.cached):
            raise ConfigError(f"token counts must be >= 0, and a split step has no cached tokens, got {self}")

    @classmethod
    def of(cls, layout: TokenLayout, kept: int | None = None) -> StepTokens:
        """A call of `layout` that keeps `kept` reference tokens; all of them by default."""
        references = layout.reference_tokens
        return cls(layout.text, layout.rows - references, references if kept is None else kept)

    @property
    def joint(self) -> int:
        """Rows of the joint sequence (S)."""
        return self.text + self.generation + self.references

    @property
    def pairs(self) -> int:
        """Query-key pairs of one attention layer and head."""
        if self.split:
            return (self.text + self.generation) * self.joint + self.references**2
        return self.joint * (self.joint + self.cached)
