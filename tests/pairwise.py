"""Half of a cross product, in which every pair of values still meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest

__all__ = ["pairwise"]


def pairwise(**axes: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test over the combinations whose places, one in each axis, have an even sum.

    Any two values of two axes stand in one of them, as a third axis has both an even and an odd place::

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
    chosen = [one for one in product(*map(enumerate, named)) if sum(place for place, _ in one) % 2 == 0]
    return pytest.mark.parametrize(
        tuple(axes),
        [tuple(value for _, (_, value) in one) for one in chosen],
        ids=["-".join(name for _, (name, _) in one) for one in chosen],
    )


def _name(value: Any) -> str:
    return getattr(value, "__name__", str(value))
