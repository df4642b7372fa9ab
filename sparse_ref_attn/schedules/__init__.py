"""Budgets: how many reference tokens take part at each step of a run.

Every budget reads one clock, ``progress = 1 - t/T``: 0 at the first, high-noise step and 1 at the last (`Clock`).

ReCAST's eq. (4) with its published 256, 1024 and gamma 2 averages 517 tokens over 28 uniform steps, not the ~600 that
the paper states, and 654 when the dense profiling step is counted: `Budget.mean_tokens` tells.
"""

from __future__ import annotations

from ..errors import ConfigError
from .base import Budget, Keep, Piecewise, check_keep
from .clock import Clock
from .curves import Constant, Cosine, Descending, Linear, Pieces, Polynomial
from .rounding import check_floor, floors, round_joint
from .top_p import TopP

__all__ = [
    "Budget",
    "Clock",
    "Constant",
    "Cosine",
    "Descending",
    "Keep",
    "Linear",
    "Pieces",
    "Piecewise",
    "Polynomial",
    "TopP",
    "budget",
    "check_floor",
    "check_keep",
    "floors",
    "from_dict",
    "round_joint",
]


from_dict = Budget.from_dict


def budget(value: Budget | Keep) -> Budget:
    """A budget from what a person writes: a number of tokens (int), a ratio (float in (0, 1]), or a budget.

    Raises
    ------
    ConfigError
        If `value` is none of these or outside its range.

    Examples
    --------
    >>> budget(0.25), budget(512)
    (Constant(keep=0.25, per='reference'), Constant(keep=512, per='reference'))
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, int | float):
        return Constant(value)
    raise ConfigError(f"a budget must be a Budget, a number of tokens (int) or a ratio (float), got {value!r}")
