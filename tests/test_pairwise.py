"""`pairwise` by its promise: few combinations, every pair of values among them, each with a name."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.pairwise import pairwise


@pytest.mark.parametrize(("sizes", "most"), [((2, 2, 2), 4), ((13, 2, 3), 39), ((3, 3, 2, 2), 10), ((4, 2, 2), 8)])
def test_every_pair_of_values_meets_in_few_combinations(sizes: tuple[int, ...], most: int) -> None:
    axes = [tuple(f"{axis}{value}" for value in range(size)) for axis, size in enumerate(sizes)]
    mark = pairwise(**{f"axis_{i}": axis for i, axis in enumerate(axes)}).mark
    names, chosen = mark.args
    assert names == tuple(f"axis_{i}" for i in range(len(sizes)))
    everything = list(product(*axes))
    assert set(chosen) < set(everything)
    assert len(chosen) == len(set(chosen)) <= most
    for one, other in combinations(range(len(axes)), 2):
        assert {(c[one], c[other]) for c in chosen} == set(product(axes[one], axes[other]))
    assert mark.kwargs["ids"] == ["-".join(c) for c in chosen]


def test_a_mapping_names_its_values() -> None:
    mark = pairwise(a={"one": object(), "two": object()}, b=[int, str], c=[False, True]).mark
    assert mark.kwargs["ids"] == ["one-int-False", "one-str-True", "two-int-True", "two-str-False"]


def test_two_axes_have_no_half_that_would_do() -> None:
    with pytest.raises(ValueError, match="at least three axes"):
        pairwise(a=[1, 2], b=[3, 4])
