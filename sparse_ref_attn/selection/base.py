"""What every selector is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, PixelsUnavailableError
from ..types import TokenLayout

__all__ = ["FromFunction", "Probe", "Reduced", "Reducer", "References", "Selector"]


@dataclass(frozen=True)
class Probe:
    """Attention that must be measured in a dense profiling step before a selector can score.

    Parameters
    ----------
    queries : {"generation", "reference"}
        Whose attention to the reference tokens is averaged. "reference" means the tokens of the
        same reference.
    blocks : str or tuple of int
        "all", "double", "single" (the joint-stream blocks) or indices over all blocks in order.
    steps : tuple of int
        Steps that run dense and are averaged.
    query_stride : int
        Every n-th query is used.
    value_norm : bool
        Weight each head's attention by the norm of the token's value.
    """

    queries: str = "generation"
    blocks: str | tuple[int, ...] = "single"
    steps: tuple[int, ...] = (0,)
    query_stride: int = 1
    value_norm: bool = False


@dataclass
class References:
    """The references of one run, as selectors see them.

    Parameters
    ----------
    layout : TokenLayout
        Grids and sizes.
    tokens : Tensor, shape (B, R, D)
        Rows of all references as the transformer receives them (packed latents).
    pixels : sequence of (Tensor or None)
        Per reference the pixels that the pipeline encoded, shape (b, 3, H, W) in [-1, 1], where
        b is 1 or the batch; None when it was given as latents.
    attention : mapping of Probe to Tensor, shape (R,), float32
        What the profiling steps measured, mean over items, heads, blocks and steps.
    generator : torch.Generator
        The library's own CPU generator, reseeded every run.
    encode : callable, optional
        From pixels (b, 3, H, W) in [-1, 1] to reference tokens (b, R', D) and their grid, by the
        pipeline's own VAE; draws no random numbers. None for a bare transformer.
    prompt : Tensor, shape (B, E), float32, optional
        Mean of the text rows that the transformer is given, of the conditional items; None where it has none.
    """

    layout: TokenLayout
    tokens: Tensor
    pixels: Sequence[Tensor | None] = ()
    attention: Mapping[Probe, Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=torch.Generator)
    encode: Callable[[Tensor], tuple[Tensor, tuple[int, int]]] | None = None
    prompt: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.layout.sizes

    def grid(self, i: int) -> tuple[int, int]:
        """Height and width in tokens of reference `i`."""
        grid = self.layout.references[i].grid
        if grid is None:
            raise PixelsUnavailableError(
                f"this selector needs reference {i} as a full grid of tokens, got {self.sizes[i]} tokens without a grid"
            )
        return grid

    def image(self, i: int, on_latents: str = "error") -> Tensor:
        """Reference `i` as an image, shape (b, channels, H, W), float32.

        The pixels that the pipeline encoded; if it was given latents and `on_latents` is
        "use", the latents laid out as an image of one token a cell.

        Raises
        ------
        PixelsUnavailableError
            If there are no pixels and `on_latents` is "error".
        """
        pixels = self.pixels[i] if i < len(self.pixels) else None
        if pixels is not None:
            return pixels.float()
        if on_latents == "use":
            height, width = self.grid(i)
            rows = self.split(self.tokens)[i].float()
            return rows.transpose(1, 2).reshape(rows.shape[0], -1, height, width)
        raise PixelsUnavailableError(
            f"this selector looks at pixels, and reference {i} has none: the pipeline was given latents, a bare "
            "transformer was patched, or no image that this call encoded is surely the one that the tokens are of. "
            'Patch the pipeline, pass images, or say on_latents="use"'
        )

    def split(self, rows: Tensor) -> list[Tensor]:
        """Split (..., R, D) or (R,) over the references."""
        return list(rows.split(self.sizes, dim=-2 if rows.ndim > 1 else 0))


class Selector:
    """Decides which reference tokens matter: one score a token, higher is kept first.

    Selectors are frozen dataclasses: equal settings are equal selectors, and they travel to JSON.
    Ties are broken by position (a lower index is kept first), so that a seed reproduces.
    """

    def probes(self) -> tuple[Probe, ...]:
        """Attention this selector needs measured in a profiling step; none for most."""
        return ()

    def check(self, model: str) -> None:
        """Raise ConfigError where it cannot rank the references of a model, given as its class and its blocks.
        Asked once, when a pipeline is patched."""

    def score(self, references: References) -> list[Tensor]:
        """Scores of each reference's tokens, shapes (R_i,), float32, on the tokens' device."""
        raise NotImplementedError


def scores_of(selector: Selector, references: References) -> list[Tensor]:
    """The selector's scores, shapes (R_i,), float32, on the tokens' device.

    Raises
    ------
    ConfigError
        If it does not give one score a token.
    """
    scores = [s.to(references.tokens.device, torch.float32) for s in selector.score(references)]
    shapes = tuple(tuple(s.shape) for s in scores)
    if shapes != tuple((size,) for size in references.sizes):
        raise ConfigError(f"a selector must give one score a token, {references.sizes}, got shapes {shapes}")
    return scores


@dataclass(frozen=True)
class FromFunction(Selector):
    """A user's function as a selector: it gets `References`, returns one score tensor a reference.

    Raises
    ------
    ConfigError
        If it is no function; at scoring, if it returns something else than a sequence of tensors, arrays or numbers.
    """

    function: Callable[[References], Sequence[Any]]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigError(f"a selector's function must be callable, got {self.function!r:.200}")

    def score(self, references: References) -> list[Tensor]:
        made = self.function(references)
        try:
            return [torch.as_tensor(s, device=references.tokens.device).float() for s in made]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"a selector's function must return a tensor or array of numbers for each reference, got {made!r:.200}"
            ) from error


@dataclass(frozen=True)
class Reduced:
    """A reference after its tokens were changed, not chosen.

    Parameters
    ----------
    tokens : Tensor, shape (B, K, D)
        The new rows.
    positions : Tensor, shape (K, 2), float32
        Where each row stands in the reference's grid, (y, x) in cells; fractions are allowed.
    """

    tokens: Tensor
    positions: Tensor


class Reducer:
    """A rival of selection: makes K new tokens of each reference's R (merging, downscaling)."""

    def reduce(self, references: References, counts: tuple[int, ...]) -> list[Reduced]:
        """At most ``counts[i]`` tokens for reference i."""
        raise NotImplementedError
