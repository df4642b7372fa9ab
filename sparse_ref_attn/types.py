"""Where the tokens of one transformer call lie, and which of the reference's are kept.

Rows are counted in the *image stream*: the token axis of ``hidden_states`` as the transformer
receives it. In joint attention the image stream follows ``text`` text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LayoutError

__all__ = ["RefSelection", "Reference", "TokenLayout"]


@dataclass(frozen=True)
class Reference:
    """One reference image in the image stream.

    Parameters
    ----------
    start, length : int
        First row and number of rows (tokens).
    grid : (int, int), optional
        Height and width in tokens; rows run left to right, top to bottom. None when the tokens
        do not form a full grid.
    """

    start: int
    length: int
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 1:
            raise LayoutError(f"a reference must have start >= 0 and length >= 1, got {self}")
        if self.grid is not None and self.grid[0] * self.grid[1] != self.length:
            raise LayoutError(f"a reference's grid must hold its {self.length} tokens, got {self.grid}")


@dataclass(frozen=True)
class TokenLayout:
    """Rows of one call: text, generation, references.

    Parameters
    ----------
    rows : int
        Length of the image stream.
    text : int
        Text tokens that stand before the image stream in joint attention.
    generation : (int, int)
        First row and number of rows of the tokens being denoised.
    references : tuple of Reference
        In the order the user gave the images. Empty for a call without references.
    conditional : slice, optional
        Batch items whose attention is scored: the conditional half when a model batches
        classifier-free guidance. Default all.
    places : tuple of int
        Where each reference begins among the words of the prompt, of a model that keeps keys and values of both;
        its generation looks at all, and the words and references at what stands before them. Empty of other models.
    apart : int
        Text tokens that the image stream looks at in attention of their own, which are not among `text`.
    """

    rows: int
    text: int
    generation: tuple[int, int]
    references: tuple[Reference, ...]
    conditional: slice | None = None
    places: tuple[int, ...] = ()
    apart: int = 0

    def __post_init__(self) -> None:
        end = 0
        for reference in self.references:
            if reference.start < end or reference.start + reference.length > self.rows:
                raise LayoutError(
                    f"references must lie one after another within {self.rows} rows, got {self.references}"
                )
            end = reference.start + reference.length

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each reference."""
        return tuple(reference.length for reference in self.references)

    @property
    def reference_tokens(self) -> int:
        """Tokens of all references (R)."""
        return sum(self.sizes)

    def reference_rows(self, device: torch.device | str) -> Tensor:
        """Rows of all reference tokens, shape (R,) int64: reference token r lies at row ``out[r]``."""
        return torch.cat([torch.arange(r.start, r.start + r.length, device=device) for r in self.references])


@dataclass(frozen=True)
class RefSelection:
    """The reference tokens kept at one step, CSR over the references.

    Parameters
    ----------
    indices : Tensor, shape (K,), int64
        Kept tokens, ascending, counted through all references: token 0 is the first of the first
        reference, token ``sizes[0]`` the first of the second.
    sizes : tuple of int
        Tokens of each reference before dropping.

    Examples
    --------
    >>> s = RefSelection(torch.tensor([0, 3, 5]), (4, 4))
    >>> s.kept, s.counts()
    (3, (2, 1))
    """

    indices: Tensor
    sizes: tuple[int, ...]

    @property
    def kept(self) -> int:
        """Number of kept tokens K (host integer, no sync)."""
        return self.indices.shape[0]

    def offsets(self) -> Tensor:
        """CSR offsets over the references, shape (references + 1,), int64, on the CPU (one sync)."""
        edges = torch.tensor([0, *self.sizes]).cumsum(0)
        return torch.searchsorted(self.indices.cpu(), edges)

    def counts(self) -> tuple[int, ...]:
        """Kept tokens of each reference (one sync)."""
        return tuple(self.offsets().diff().tolist())

    def split(self) -> list[Tensor]:
        """Kept tokens of each reference, counted from its own first token (one sync)."""
        cut = self.offsets().tolist()
        starts = _starts(self.sizes)
        return [self.indices[a:b] - s for a, b, s in zip(cut, cut[1:], starts, strict=False)]


def _starts(sizes: Sequence[int]) -> list[int]:
    out, at = [], 0
    for size in sizes:
        out.append(at)
        at += size
    return out
