"""What one step does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..selection import Reduced
from ..types import RefSelection, TokenLayout

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What one step does.

    Parameters
    ----------
    kind : {"dense", "profile", "in_flight", "sparse", "cached"}
        "in_flight" is dense and measured before `from_block`, sparse from there on; "cached" runs without reference
        rows, on stored keys and values.
    selection : RefSelection, optional
        The kept tokens of a sparse or cached step, of a profiling step that reads stored keys, and of an
        in-flight one when it has ranked. None: every token.
    reduced : sequence of Reduced, optional
        The changed tokens of a sparse step, when a rival runs instead of a selector.
    from_block : int
        Block from which on only the kept tokens take part.
    reads : bool
        Whether the step reads keys and values that the library stored.
    """

    kind: str
    selection: RefSelection | None = None
    reduced: Sequence[Reduced] | None = None
    from_block: int = 0
    reads: bool = False

    def kept(self, layout: TokenLayout) -> int:
        """Reference tokens that take part."""
        if self.selection is not None:
            return self.selection.kept
        if self.reduced is not None:
            return sum(r.positions.shape[0] for r in self.reduced)
        return layout.reference_tokens
