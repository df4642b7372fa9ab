"""The few combinations of a cross product in which every pair of values still meets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

__all__ = ["pairwise"]


def pairwise(**axes: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test over combinations in which any two values of two axes meet.

    They are chosen one after the other, each the one in which the most pairs meet for the first time::

        @pairwise(case=MODELS, error=[ZeroDivisionError, KeyboardInterrupt], late=[False, True])

    Parameters
    ----------
    **axes : sequence or mapping
        By the test's argument: its values, with the names that a mapping gives them; at least three axes of at least
        two values.
    """
    if len(axes) < 3 or min(map(len, axes.values())) < 2:
        raise ValueError(f"pairwise takes at least three axes of at least two values, got {axes}")
    named = [
        list(axis.items()) if isinstance(axis, Mapping) else [(_name(x), x) for x in axis] for axis in axes.values()
    ]
    chosen = list(_chosen([range(len(axis)) for axis in named]))
    return pytest.mark.parametrize(
        tuple(axes),
        [tuple(axis[place][1] for axis, place in zip(named, one, strict=True)) for one in chosen],
        ids=["-".join(axis[place][0] for axis, place in zip(named, one, strict=True)) for one in chosen],
    )


def _chosen(axes: list[range]) -> Iterator[tuple[int, ...]]:
    """Places, one in each axis."""
    left = set().union(*(_pairs(one) for one in product(*axes)))
    while left:
        best = max(product(*axes), key=lambda one: len(left & _pairs(one)))
        left -= _pairs(best)
        yield best


def _pairs(places: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(places), 2))


def _name(value: Any) -> str:
    return getattr(value, "__name__", str(value))
