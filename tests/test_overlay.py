"""The pictures of hand-made runs, against colours and heights worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.overlay import save_budget_strip, save_overlay
from sparse_ref_attn.overlay.kept import OUTLINE, VEIL
from sparse_ref_attn.record import RunRecord
from tests.hand_made_runs import dense_step, four_steps, layout_of, step_of


@pytest.fixture
def run() -> RunRecord:
    return four_steps()


RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_colours(grid: tuple[int, int], kept: list[int]) -> torch.Tensor:
    """Pixels in [-1, 1], 32 a token: kept tokens red, dropped ones blue."""
    mask = torch.zeros(math.prod(grid), dtype=torch.bool)
    mask[kept] = True
    big = mask.reshape(grid).repeat_interleave(32, 0).repeat_interleave(32, 1)
    return (torch.stack([big, torch.zeros_like(big), ~big])[None].float() * 2 - 1).to(torch.bfloat16)


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(np.int16)


def near(picture: np.ndarray, colour: tuple[float, ...], within: int) -> np.ndarray:
    return (np.abs(picture - np.array(colour, np.int16)) <= within).all(-1)


@pytest.mark.parametrize("grid", [(4, 4), (3, 9), (9, 3), (33, 31)])
def test_kept_tokens_keep_their_colour_and_dropped_ones_are_dark(tmp_path, grid):
    """A block of kept tokens at the top left, as large as its share; dropped tokens lie under a dark blue veil."""
    h, w = (grid[0] + 1) // 2, (grid[1] + 1) // 2
    kept = [y * grid[1] + x for y in range(h) for x in range(w)]
    layout = layout_of(grid)
    record = RunRecord(layout, 1, 1, steps=[step_of(0, layout, kept)], pixels=[two_colours(grid, kept)])
    save_overlay(record, tmp_path / "kept.png")
    picture = pixels_of(tmp_path / "kept.png")
    assert not near(picture, BLUE, 60).any()
    ys, xs = np.nonzero(near(picture, RED, 40))
    cell = (ys.max() - ys.min() + 1) / h
    assert cell >= 10
    assert (xs.max() - xs.min() + 1) / w == pytest.approx(cell, rel=0.01)
    assert len(ys) == pytest.approx(h * w * cell**2, rel=0.1)
    # The centre of a kept cell has its mean colour; that of the last, dropped, cell is the veil's, a little lighter.
    y0, x0 = ys.min(), xs.min()
    inside = picture[y0 + round(cell / 2), x0 + round(cell / 2)]
    outside = picture[y0 + round((grid[0] - 0.5) * cell), x0 + round((grid[1] - 0.5) * cell)]
    assert np.abs(inside - RED).max() <= 2
    assert np.abs(outside - VEIL).max() <= 40
    # Just right of the kept block runs the outline.
    assert near(picture[y0 + round(cell / 2), xs.max() + 1 : xs.max() + 4][None], OUTLINE, 0).any()


@pytest.mark.parametrize("shade", [-1.0, 0.0, 1.0], ids=["black", "grey", "white"])
def test_what_was_kept_shows_on_a_photo_of_one_shade(tmp_path, shade):
    """A white photo's kept tokens looked like holes in the page, outlined in white on white."""
    layout = layout_of((12, 12))
    record = RunRecord(layout, 1, 1, steps=[step_of(0, layout, [40, 41, 52, 53])])
    record.pixels = [torch.full((1, 3, 96, 96), shade)]
    save_overlay(record, tmp_path / "kept.png")
    picture = pixels_of(tmp_path / "kept.png")
    ys, xs = np.nonzero(near(picture[100:], OUTLINE, 0) & (np.arange(picture.shape[1]) > 100))
    kept = picture[100:][ys.min() + 6, (xs.min() + xs.max()) // 2]
    dropped = picture[100:][ys.min() - 6, (xs.min() + xs.max()) // 2]
    assert np.abs(kept - 127.5 * (shade + 1)).max() <= 2
    for one, other in ((kept, dropped), (kept, OUTLINE), (dropped, OUTLINE)):
        assert np.abs(one - np.array(other)).max() > 60


def test_heat_shows_the_highest_score_in_yellow_and_the_lowest_in_violet(tmp_path):
    layout = layout_of((2, 2))
    record = RunRecord(layout, 1, 1, steps=[step_of(0, layout, [3])])
    record.scores = [torch.tensor([0.0, 0.0, math.nan, 1.0])]
    save_overlay(record, tmp_path / "kept.png")
    picture = pixels_of(tmp_path / "kept.png")
    yellow, violet = near(picture, (253, 231, 37), 1), near(picture, (68, 1, 84), 1)
    assert violet.sum() == pytest.approx(2 * yellow.sum(), rel=0.05)
    record.scores = None
    save_overlay(record, tmp_path / "plain.png")
    plain = pixels_of(tmp_path / "plain.png")
    assert not near(plain, (253, 231, 37), 1).any()


def test_overlay_shows_the_step_that_was_asked_for(tmp_path):
    layout = layout_of((2, 2))
    record = RunRecord(layout, 1, 3, steps=[step_of(0, layout, [0, 1, 2]), step_of(1, layout, [0])])
    record.steps.append(dense_step(2, layout, "dense"))
    record.pixels = [two_colours((2, 2), [0, 1, 2, 3])]
    areas = []
    for step in (0, 1, None):
        save_overlay(record, tmp_path / "kept.png", step)
        areas.append(int(near(pixels_of(tmp_path / "kept.png"), RED, 5).sum()))
    assert areas[0] == pytest.approx(3 * areas[1], rel=0.02)
    assert areas[2] == areas[1]


@pytest.mark.parametrize(
    ("name", "form"),
    [("o.jpg", "JPEG"), ("o.JPEG", "JPEG"), ("o.webp", "WEBP"), ("o.tiff", "TIFF"), ("o.png", "PNG"), ("o", "PNG")],
)
def test_a_picture_is_in_the_format_of_its_name(tmp_path, name, form):
    """`save_overlay("o.jpg")` wrote PNG bytes."""
    layout = layout_of((2, 2))
    record = RunRecord(layout, 1, 1, steps=[step_of(0, layout, [3])])
    for save in (save_overlay, save_budget_strip):
        save(record, tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert (image.format, image.width) == (form, 1400)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_of_no_picture_is_refused_and_what_was_there_stays(tmp_path):
    layout = layout_of((2, 2))
    record = RunRecord(layout, 1, 1, steps=[step_of(0, layout, [3])])
    (tmp_path / "o.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"must end in \.png, .*, got .*o\.txt"):
        save_overlay(record, tmp_path / "o.txt")
    assert (tmp_path / "o.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"o\.png must fit into .*none"):
        save_overlay(record, tmp_path / "none" / "o.png")


def test_budget_strip_bars_have_the_height_of_their_tokens(tmp_path):
    layout = layout_of((10, 10))
    record = RunRecord(layout, 1, 4)
    record.steps = [dense_step(0, layout), dense_step(1, layout, "dense")]
    record.steps += [step_of(2, layout, list(range(50))), step_of(3, layout, list(range(25)))]
    save_budget_strip(record, tmp_path / "strip.png")
    picture = pixels_of(tmp_path / "strip.png")
    assert picture.shape[1] == 1400

    def heights(colour: tuple[int, int, int]) -> list[int]:
        """Distinct heights of the columns of one colour that are taller than a legend's swatch."""
        columns = near(picture[:-40], colour, 0).sum(0)
        return sorted({int(c) for c in columns if c > 20}, reverse=True)

    full = heights((230, 138, 30))[0]
    assert heights((150, 156, 166))[0] == pytest.approx(full, abs=2)
    half, quarter = heights((46, 108, 180))
    assert (half, quarter) == (pytest.approx(full / 2, abs=2), pytest.approx(full / 4, abs=2))


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 1)],
        [(64, 64)] * 2,
        [(4, 12), (8, 8), (12, 4)],
        [(1, 200), (200, 1)],
        [5000, 1],
        [(64, 256), (256, 64)],
        [(5, 4)] * 64,
    ],
)
def test_no_shape_or_number_of_references_breaks_the_page(tmp_path, shapes):
    """Fixed width, a margin of clean paper all round, and nothing of the page left out of proportion."""
    layout = layout_of(*shapes)
    kept = list(range(0, layout.reference_tokens, 3))
    record = RunRecord(layout, 1, 300, steps=[dense_step(0, layout), step_of(299, layout, kept)])
    record.scores = [torch.linspace(0, 1, size) for size in layout.sizes]
    save_overlay(record, tmp_path / "kept.png")
    picture = pixels_of(tmp_path / "kept.png")
    assert picture.shape[1] == 1400
    assert 500 < picture.shape[0] < 4500
    for border in (picture[:30], picture[-30:], picture[:, :30], picture[:, -30:]):
        assert (border == 255).all()


def test_more_references_need_a_taller_page_only_when_a_row_is_full(tmp_path):
    heights = []
    for count in (5, 6, 7):
        layout = layout_of(*[(4, 4)] * count)
        record = RunRecord(layout, 1, 1, steps=[step_of(0, layout, [0])])
        save_overlay(record, tmp_path / "kept.png")
        heights.append(len(pixels_of(tmp_path / "kept.png")))
    assert heights[0] == heights[1] < heights[2]


def test_overlay_errors_say_what_must_hold(tmp_path, run):
    path = tmp_path / "kept.png"
    with pytest.raises(ConfigError, match=r"that was run \(0 to 3\), got 9"):
        save_overlay(run, path, 9)
    run.scores = [torch.ones(4)]
    with pytest.raises(LayoutError, match="scores must have"):
        save_overlay(run, path)
    run.scores, run.pixels = None, [torch.zeros(3, 8, 8)]
    with pytest.raises(LayoutError, match="shape"):
        save_overlay(run, path)
    run.steps = []
    with pytest.raises(LayoutError, match="got 2 references and 0 steps"):
        save_overlay(run, path)
    with pytest.raises(LayoutError, match="call the pipeline first"):
        save_budget_strip(run, path)
    assert not path.exists()


def test_a_run_that_kept_everything_has_an_overlay_too(tmp_path, run):
    layout = run.layout
    run.steps, run.pixels = run.steps[:2], [torch.full((1, 3, 8, 8), 0.5), None]
    save_overlay(run, tmp_path / "dense.png")
    run.steps[-1] = step_of(1, layout, [0, 4])
    save_overlay(run, tmp_path / "sparse.png")
    assert pixels_of(tmp_path / "dense.png").sum() > pixels_of(tmp_path / "sparse.png").sum()
