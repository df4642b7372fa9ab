"""Masks and boxes keep exactly the subject, and grow outward from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.selection import Boxes, Random, SubjectMask
from sparse_ref_attn.selection.cells import area_pool

from .scenes import disc, recall, references


def best(score, count):
    return set(score.sort(descending=True, stable=True).indices[:count].tolist())


def test_area_pool_is_the_block_mean_where_sizes_divide():
    image = torch.rand(2, 12, 20, dtype=torch.float64)
    torch.testing.assert_close(area_pool(image, (3, 5)), image.reshape(2, 3, 4, 5, 4).mean((2, 4)).flatten(1))


@settings(max_examples=40, deadline=None)
@given(*(st.integers(1, 30) for _ in range(4)))
def test_area_pool_keeps_the_mean_and_splits_pixels_by_area(height, width, rows, columns):
    image = torch.rand(height, width, dtype=torch.float64)
    fine = image.repeat_interleave(rows, 0).repeat_interleave(columns, 1)  # each pixel cut to the common grid
    truth = fine.reshape(rows, height, columns, width).mean((1, 3)).flatten()
    torch.testing.assert_close(area_pool(image, (rows, columns)), truth)


def as_kinds(mask):
    image = pytest.importorskip("PIL.Image")
    array = mask.numpy()
    kinds = [mask, mask.float(), mask.to(torch.uint8), array, array.astype(np.uint8) * 255, array.astype(np.float16)]
    return [*kinds, image.fromarray(array), image.fromarray(array.astype(np.uint8) * 255)]


def test_keeps_exactly_the_mask_from_any_kind_of_image():
    mask = torch.zeros(40, 56, dtype=torch.bool)
    mask[8:24, 16:48] = True
    subject = {y * 7 + x for y in (1, 2) for x in (2, 3, 4, 5)}
    scores = [SubjectMask(kind).score(references([(5, 7)]))[0] for kind in as_kinds(mask)]
    for score in scores:
        assert best(score, len(subject)) == subject
        torch.testing.assert_close(score, scores[0])


def test_beats_random_on_the_disc():
    grid = (11, 17)
    inside = disc(grid)[1]
    subject = area_pool(inside.float(), grid) > 0.5
    found = recall(SubjectMask(inside).score(references([grid]))[0], subject)
    assert found == 1.0
    assert found >= recall(Random().score(references([grid]))[0], subject) + 0.5


def test_budget_beyond_the_subject_grows_outward():
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = np.zeros((9, 14), dtype=bool)
    mask[4, 3], mask[6, 11] = True, True
    score = SubjectMask(mask).score(references([(9, 14)]))[0]
    distance = torch.from_numpy(ndimage.distance_transform_edt(~mask)).flatten()
    ordered = distance[score.sort(descending=True, stable=True).indices]
    assert (ordered.diff() >= -1e-12).all()


def test_budget_below_the_subject_is_spread_over_it():
    mask = torch.zeros(16, 16)
    mask[2:14, 3:15] = 1
    kept = best(SubjectMask(mask).score(references([(16, 16)]))[0], 36)
    quarters = [sum(2 + a <= k // 16 < 8 + a and 3 + b <= k % 16 < 9 + b for k in kept) for a in (0, 6) for b in (0, 6)]
    assert sum(quarters) == 36
    assert min(quarters) >= 6


def test_partly_marked_cells_are_ordered_by_share():
    mask = torch.zeros(8, 32)
    for cell, columns in enumerate((2, 8, 5, 0)):
        mask[:, 8 * cell : 8 * cell + columns] = 1
    score = SubjectMask(mask).score(references([(1, 4)]))[0]
    assert score.argsort(descending=True).tolist() == [1, 2, 0, 3]


def test_one_mask_a_reference():
    a, b = torch.zeros(4, 4), torch.zeros(6, 3)
    a[0, 1] = b[5, 2] = 1
    scores = SubjectMask([a, None, b]).score(references([(4, 4), (2, 2), (6, 3)]))
    assert [s.argmax().item() for s in scores[::2]] == [1, 17]
    assert (scores[1] >= 1).all()
    with pytest.raises(ConfigError, match="as many masks as references, 2, got 1"):
        SubjectMask(a).score(references([(4, 4), (6, 3)]))


def test_aspect_must_be_the_references():
    with pytest.raises(ConfigError, match=r"1\.000 wide to high .*got 2\.000"):
        SubjectMask(torch.ones(50, 100)).score(references([(8, 8)]))
    # 1000 x 667 pixels become 63 x 42 tokens: rounding is no other aspect.
    SubjectMask(torch.ones(667, 1000)).score(references([(42, 63)]))


@pytest.mark.parametrize(
    "mask", [torch.zeros(4, 4), torch.ones(3, 4, 4), torch.full((4, 4), torch.nan), torch.full((4, 4), 1.5), "mask.png"]
)
def test_bad_masks_are_refused_at_once(mask):
    with pytest.raises(ConfigError, match="mask"):
        SubjectMask(mask)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_boxes_cover_by_exact_area(height, width, data):
    edge = st.integers(0, 23)
    boxes, canvas = [], torch.zeros(24 * height, 24 * width, dtype=torch.float64)
    for _ in range(data.draw(st.integers(1, 3))):
        (x0, x1), (y0, y1) = (sorted((data.draw(edge) * n, (data.draw(edge) + 1) * n)) for n in (width, height))
        if x0 == x1 or y0 == y1:
            continue
        boxes.append((x0 / (24 * width), y0 / (24 * height), x1 / (24 * width), y1 / (24 * height)))
        canvas[y0:y1, x0:x1] = 1
    if not boxes:
        return
    score = Boxes([boxes]).score(references([(height, width)]))[0]
    covered = area_pool(canvas, (height, width)).float()
    assert ((score - covered).abs() <= 2e-3 + 1e-6).all()
    assert score[covered > 1e-9].min() > score[covered <= 1e-9].max() if (covered <= 1e-9).any() else True


def test_a_box_keeps_exactly_its_cells():
    score = Boxes([[(0.25, 0.5, 0.75, 1.0)], None]).score(references([(4, 8), (1, 1)]))
    assert best(score[0], 8) == {y * 8 + x for y in (2, 3) for x in (2, 3, 4, 5)}
    assert score[1].shape == (1,)


@pytest.mark.parametrize(
    "boxes",
    [
        [[]],
        [[(0, 0, 1)]],
        [[(0.5, 0, 0.5, 1)]],
        [[(0, 0, 1.2, 1)]],
        [(0, 0, 1, 1)],
        3,
        "abcd",
        [["abcd"]],
        [[(0, 0, 1, float("nan"))]],
    ],
)
def test_bad_boxes(boxes):
    with pytest.raises(ConfigError, match="box"):
        Boxes(boxes)


def test_boxes_for_each_reference():
    with pytest.raises(ConfigError, match="as many lists of boxes"):
        Boxes([[(0, 0, 1, 1)]]).score(references([(2, 2), (2, 2)]))
