"""A call whose image stream was cut to the kept rows, or changed by a rival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..selection import Reduced

__all__ = ["Shortened"]


@dataclass(frozen=True)
class Shortened:
    """What became of one call.

    Parameters
    ----------
    kwargs : dict
        Its arguments as they were.
    rows : Tensor, shape (rows,), int64
        Rows of the full stream at which the rows of the shortened one stand in the output, ascending.
    size : int
        Rows of the full stream.
    reduced : sequence of Reduced, optional
        What stands in each reference's place; None where rows were dropped.
    """

    kwargs: dict[str, Any]
    rows: Tensor
    size: int
    reduced: Sequence[Reduced] | None = None
