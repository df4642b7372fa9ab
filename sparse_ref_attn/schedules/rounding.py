"""Counts from real numbers, and joint lengths rounded to what kernels and context parallelism like."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..checks import is_number
from ..errors import BudgetError, ConfigError

__all__ = ["check_floor", "floors", "round_joint", "whole"]


def check_floor(name: str, floor: float | int) -> None:
    """Raise ConfigError unless `floor` is a ratio in [0, 1] (a float) or a number of tokens (an int)."""
    if not is_number(floor) or not floor >= 0:
        raise ConfigError(f"{name} must be a ratio in [0, 1] or a number of tokens, got {floor!r}")
    if isinstance(floor, float) and floor > 1:
        raise ConfigError(f"{name} as a ratio must lie in [0, 1], got {floor}")


def floors(floor: float | int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Tokens that `floor`, a ratio or a number, means for each reference of `sizes` tokens.

    Raises
    ------
    BudgetError
        If a reference has fewer.

    Examples
    --------
    >>> floors(0.25, (8, 100)), floors(3, (8, 100))
    ((2, 25), (3, 3))
    """
    counts = tuple(round(floor * size) if isinstance(floor, float) else floor for size in sizes)
    for reference, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if count > size:
            raise BudgetError(f"floor must not exceed reference {reference}'s {size} tokens, got {count}")
    return counts


def whole(tokens: float) -> int:
    """Round half up, at least 1.

    A ratio such as 0.29 is not exact in binary, so a value within 1e-9 below a half counts as the half.

    Examples
    --------
    >>> whole(2.5), whole(0.2), whole(0.29 * 50)
    (3, 1, 15)
    """
    return max(1, math.floor(tokens + 0.5 + 1e-9))


def round_joint(kept: int, joint_other: int, multiple: int, available: int) -> int:
    """Raise a kept count until the *joint* length is a multiple.

    The smallest ``k >= kept`` with ``(joint_other + k) % multiple == 0``. Kernels and context parallelism see the whole
    joint sequence, so the joint length is rounded, not the kept count.

    Parameters
    ----------
    kept : int
        Reference tokens that the budget asks for, in [0, available].
    joint_other : int
        Rows of the joint sequence that are not reference tokens (text + generation), >= 0.
    multiple : int
        Such as 64, or the context-parallel size, >= 1.
    available : int
        Reference tokens there are.

    Returns
    -------
    int
        In [kept, available]; `available` where rounding up would exceed it, so that the length is then no multiple.

    Raises
    ------
    BudgetError
        If an argument is outside its range.

    Examples
    --------
    >>> round_joint(600, 512 + 4096, 64, 4096)  # 5208 -> 5248
    640
    >>> round_joint(4090, 512 + 4096 + 7, 64, 4096)
    4096
    """
    if multiple < 1 or joint_other < 0 or not 0 <= kept <= available:
        raise BudgetError(
            "round_joint needs multiple >= 1, joint_other >= 0 and 0 <= kept <= available, "
            f"got multiple {multiple}, joint_other {joint_other}, kept {kept}, available {available}"
        )
    return min(kept + -(joint_other + kept) % multiple, available)
