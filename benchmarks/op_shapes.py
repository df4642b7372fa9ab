"""Attention shapes of the supported models at 1024 x 1024 (4,096 tokens an image)."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["MODELS", "OpShape", "quick"]


@dataclass(frozen=True)
class OpShape:
    """One attention call: generation and text attend to themselves and to kept reference tokens.

    Parameters
    ----------
    model : str
    heads, channels : int
        Heads H and head dim C.
    text, image : int
        Text tokens; tokens of one image.
    references : int
        Reference images.
    """

    model: str
    heads: int
    channels: int
    text: int
    image: int = 4096
    references: int = 1

    @property
    def queries(self) -> int:
        """Queries N, and as many dense keys."""
        return self.text + self.image

    @property
    def bank(self) -> int:
        """Reference tokens R."""
        return self.references * self.image

    def flops(self, kept: int) -> float:
        """Of one forward pass: two matrix products."""
        return 4.0 * self.queries * (self.queries + kept) * self.heads * self.channels


MODELS = {
    "kontext": OpShape("kontext", heads=24, channels=128, text=512),
    "flux2-dev": OpShape("flux2-dev", heads=48, channels=128, text=512),
    "klein-9b": OpShape("klein-9b", heads=32, channels=128, text=512),
    "klein-4b": OpShape("klein-4b", heads=24, channels=128, text=512),
    "qwen-edit": OpShape("qwen-edit", heads=24, channels=128, text=1024),
}


def quick(shape: OpShape) -> OpShape:
    """The same at a sixteenth of the tokens: shows that a benchmark runs, and no more."""
    return replace(shape, text=shape.text // 16, image=shape.image // 16, heads=4)
