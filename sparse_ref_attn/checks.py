"""What a setting is, asked of any object at all: none of these raises."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeGuard

__all__ = ["is_int", "is_number", "is_one_of", "numbers"]


def is_one_of(value: object, choices: Collection[str]) -> TypeGuard[str]:
    """Whether it is one of these strings; an array's ``==`` would answer item by item.

    Examples
    --------
    >>> is_one_of("all", ("all", "none")), is_one_of(["all"], ("all", "none"))
    (True, False)
    """
    return isinstance(value, str) and value in choices


def is_int(value: object, least: int | None = None) -> TypeGuard[int]:
    """Whether it is an int, and no bool, of at least `least`.

    Examples
    --------
    >>> is_int(3), is_int(3, 4), is_int(3.0), is_int(True), is_int("3")
    (True, False, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an int or a float, and no bool.

    Examples
    --------
    >>> is_number(3), is_number(0.5), is_number(True), is_number("3")
    (True, True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers(values: object) -> tuple[float, ...] | None:
    """The values as floats, or None where they are no sequence of numbers.

    Examples
    --------
    >>> numbers([1, 0.5]), numbers("12"), numbers([1, "a"]), numbers(3)
    ((1.0, 0.5), None, None, None)
    """
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        return None
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch refuses a 0-d or a large tensor by the last
        return None
