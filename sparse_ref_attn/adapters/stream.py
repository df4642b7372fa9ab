"""The image stream of a call: the rows of `Adapter.tokens`, then those of an argument for references alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import LayoutError
from ..functional import pack_rows
from ..types import Reference, TokenLayout
from .collate import sample_of

if TYPE_CHECKING:
    from .base import Adapter, Found, Kwargs

__all__ = ["check_found", "own_layout", "own_rows", "reference_tokens", "restored", "stream_rows"]


def stream_rows(adapter: Adapter, kwargs: Kwargs) -> int:
    """Rows of the image stream."""
    own = None if adapter.references is None else kwargs.get(adapter.references)
    return int(kwargs[adapter.tokens].shape[1]) + (0 if own is None else int(own.shape[1]))


def reference_tokens(adapter: Adapter, kwargs: Kwargs, layout: TokenLayout) -> Tensor:
    """What the transformer is given of the references, (B, R, D)."""
    if adapter.references is None:
        return pack_rows(kwargs[adapter.tokens], layout.reference_rows(kwargs[adapter.tokens].device))
    x = kwargs[adapter.references]
    return pack_rows(x, own_layout(layout).reference_rows(x.device))


def own_rows(layout: TokenLayout, rows: Tensor) -> Tensor:
    """Rows of the references' argument among ascending `rows` of the stream, which keep every row of the generation."""
    return rows[layout.generation[1] :] - layout.generation[1]


def own_layout(layout: TokenLayout) -> TokenLayout:
    """The layout of the references' argument.

    Examples
    --------
    >>> own = own_layout(TokenLayout(6, 0, (0, 4), (Reference(4, 2),)))
    >>> own.rows, own.generation, own.references
    (2, (0, 0), (Reference(start=0, length=2, grid=None),))
    """
    first = layout.generation[1]
    moved = tuple(Reference(r.start - first, r.length, r.grid) for r in layout.references)
    return TokenLayout(layout.rows - first, layout.text, (0, 0), moved)


def check_found(adapter: Adapter, kwargs: Kwargs, found: Found) -> None:
    """Raise LayoutError where the generation or a reference lies outside the rows, or they overlap."""
    rows, ((first, length), references) = stream_rows(adapter, kwargs), found
    if adapter.references is not None:
        own = int(kwargs[adapter.tokens].shape[1])
        if (first, length) != (0, own) or any(r.start < own for r in references):
            raise LayoutError(
                f"references in an argument of their own ({adapter.references}) lie behind the {own} rows of "
                f"{adapter.tokens}, which are the generation's, got the generation at rows {first} to {first + length} "
                f"and {references}"
            )
    overlaps = any(r.start < first + length and first < r.start + r.length for r in references)
    alone = (first, length) == (0, 0) and adapter.references is None and sum(r.length for r in references) == rows
    if not alone and (first < 0 or length < 1 or first + length > rows or overlaps):
        raise LayoutError(
            f"the generation must be one or more of the {rows} rows and none of a reference's, got rows {first} to "
            f"{first + length} beside {references}; it is (0, 0) where all rows are references'"
        )


def restored(adapter: Adapter, output: Any, rows: Tensor, layout: TokenLayout) -> Any:
    """What the caller of a call with `rows` alone expects: references that stand apart have no rows in an output."""
    length = layout.generation[1]
    apart = not length or (adapter.references is not None and sample_of(output).shape[1] == length)
    return output if apart else adapter.restore(output, rows, layout.rows)
