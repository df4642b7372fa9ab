"""References found by position ids: other frames, the generation's own at other positions, and what nobody can tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn import Reference, references_from_ids


def grid(frame: float, height: int, width: int, top: float = 0, left: float = 0, unit: float = 1) -> Tensor:
    sides = (top + unit * torch.arange(height), left + unit * torch.arange(width))
    return torch.cartesian_prod(torch.tensor([float(frame)]), *(side.float() for side in sides))


ONE = ((0, 12), (Reference(12, 6, (2, 3)),))
TWO = ((0, 12), (Reference(12, 6, (2, 3)), Reference(18, 10, (2, 5))))


@pytest.mark.parametrize(
    "others",
    [
        (grid(1, 2, 3), grid(2, 2, 5)),
        (grid(1, 2, 3), grid(1, 2, 5)),  # one frame: the second starts its grid anew
        (grid(0, 2, 3, left=4), grid(0, 2, 5, left=7)),  # to the right, one after another
        (grid(0, 2, 3, top=3), grid(0, 2, 5, top=5)),  # below
        (grid(0, 2, 3, top=3, left=4), grid(0, 2, 5, top=5, left=7)),  # down the diagonal
        (grid(0, 2, 3, top=-2, left=-3), grid(0, 2, 5, left=-9)),
        (grid(1, 2, 3), grid(0, 2, 5, left=4)),  # back at the generation's frame
        (grid(0, 2, 3, left=4), grid(1, 2, 5)),
    ],
)
@pytest.mark.parametrize("unit", [1, 0.5, 1 / 3])
def test_several_references(others: tuple[Tensor, ...], unit: float) -> None:
    ids = torch.cat([grid(0, 3, 4), *others]) * torch.tensor([1, unit, unit])
    assert references_from_ids(ids) == TWO
    assert references_from_ids(ids[None].expand(2, -1, -1)) == TWO
    assert references_from_ids(ids, generation=12) == TWO
    assert references_from_ids(ids[:18]) == ONE


def test_no_reference() -> None:
    assert references_from_ids(grid(0, 3, 4)) == ((0, 12), ())
    assert references_from_ids(grid(0, 1, 4)) == ((0, 4), ())
    assert references_from_ids(grid(0, 3, 4), generation=12) == ((0, 12), ())


def test_one_grid_of_both_is_told_apart_by_the_generations_rows() -> None:
    ids = torch.cat([grid(0, 3, 4), grid(0, 2, 4, top=3)])
    assert references_from_ids(ids) == ((0, 20), ())
    assert references_from_ids(ids, generation=12) == ((0, 12), (Reference(12, 8, (2, 4)),))


@pytest.mark.parametrize(
    "ids",
    [
        torch.cat([grid(0, 3, 4), grid(0, 2, 3)]),  # on the generation
        torch.cat([grid(0, 3, 4), grid(0, 2, 3, left=2)]),  # partly
        torch.cat([grid(0, 3, 4), grid(1, 2, 3), grid(0, 2, 3)]),
        torch.cat([grid(0, 3, 4), grid(0, 2, 3, left=4), grid(0, 2, 3, left=5)]),  # two on one another
        torch.cat([grid(0, 3, 4), grid(0, 3, 4, left=4)[[0, 3, 4, 6, 7, 9, 10, 11]]]),  # a part of one
        grid(0, 3, 4)[torch.randperm(12, generator=torch.Generator().manual_seed(0))],
    ],
)
def test_what_nobody_can_tell_is_unknown(ids: Tensor) -> None:
    assert references_from_ids(ids) is None


def test_a_reference_of_another_frame_may_have_lost_rows() -> None:
    ids = torch.cat([grid(0, 3, 4), grid(1, 3, 4)[[0, 3, 4, 6, 11]]])
    assert references_from_ids(ids) == ((0, 12), (Reference(12, 5, None),))


def test_rows_of_the_generation_must_be_there() -> None:
    for wrong in (0, 13):
        with pytest.raises(sra.LayoutError, match=f"the generation must be 1 to 12 rows, .* got {wrong}"):
            references_from_ids(grid(0, 3, 4), generation=wrong)
