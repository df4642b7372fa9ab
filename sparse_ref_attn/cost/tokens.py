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
    before : int, optional
        On a split step, query-key pairs of text and references where these look at what stands before them.
    dropped, from_block : int
        Further reference rows that take part in the blocks before `from_block` alone.
    apart : int
        Text tokens at which the image stream looks in attention of their own, in each layer.

    Raises
    ------
    ConfigError
        If a count is negative, a split step also has cached tokens, or rows leave by depth on either.
    """

    text: int
    generation: int
    references: int
    cached: int = 0
    split: bool = False
    before: int | None = None
    dropped: int = 0
    from_block: int = 0
    apart: int = 0

    def __post_init__(self) -> None:
        counts = (self.text, self.generation, self.references, self.cached, self.dropped, self.from_block, self.apart)
        if min(counts) < 0 or (self.split and self.cached):
            raise ConfigError(f"token counts must be >= 0, and a split step has no cached tokens, got {self}")
        if bool(self.dropped) != bool(self.from_block) or (self.dropped and (self.split or self.cached)):
            raise ConfigError(f"rows that leave by depth need a block to leave at and no reference cache, got {self}")

    @classmethod
    def of(cls, layout: TokenLayout, kept: int | None = None, from_block: int = 0) -> StepTokens:
        """A call of `layout` that keeps `kept` reference tokens (default all) from block `from_block` on."""
        references = layout.reference_tokens
        kept = references if kept is None else kept
        dropped = references - kept if from_block else 0
        by_depth = {"dropped": dropped, "from_block": from_block} if dropped else {}
        return cls(layout.text, layout.rows - references, kept, apart=layout.apart, **by_depth)

    @classmethod
    def storing(cls, layout: TokenLayout, kept: int) -> StepTokens:
        """A call that runs `kept` reference tokens for later ones to read."""
        before, end, words = 0, 0, layout.text
        for place, size in zip(layout.places, layout.sizes, strict=False):
            text = place - end
            before, end, words = before + text * place + size * (place + size), place + size, words - text
        before += words * (layout.text + layout.reference_tokens)
        return cls(layout.text, layout.generation[1], kept, split=True, before=before if layout.places else None)

    @classmethod
    def reading(cls, layout: TokenLayout, stored: int) -> StepTokens:
        """A call that reads `stored` reference tokens, and the text's where these are stored too."""
        text = 0 if layout.places else layout.text
        return cls(text, layout.generation[1], 0, cached=stored + layout.text - text, apart=layout.apart)

    @property
    def joint(self) -> int:
        """Rows of the joint sequence (S), in the last block."""
        return self.text + self.generation + self.references

    @property
    def own_pairs(self) -> int:
        """Query-key pairs of one head where text, generation and references each look at themselves."""
        return self.text**2 + self.generation**2 + (self.references + self.dropped) ** 2

    def pairs(self, layers: int) -> int:
        """Query-key pairs of one head over `layers` attention layers, those with text apart among them."""
        image = self.generation + self.references
        apart = self.apart * (layers * image + self.from_block * self.dropped)
        if self.before is not None:
            return layers * (self.generation * self.joint + self.before)
        if self.split:
            return layers * ((self.text + self.generation) * self.joint + self.references**2)
        leading = self.from_block * (self.joint + self.dropped) ** 2
        return apart + leading + (layers - self.from_block) * self.joint * (self.joint + self.cached)
