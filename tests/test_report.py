"""The report and the pictures of hand-made runs, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.overlay import save_budget_strip, save_overlay
from sparse_ref_attn.overlay.kept import OUTLINE, VEIL
from sparse_ref_attn.record import BlockAttention, RunRecord, Stability, StepRecord
from sparse_ref_attn.report import FlopSummary, attention_table, summary
from sparse_ref_attn.types import Reference, RefSelection, TokenLayout


def layout_of(*shapes: tuple[int, int] | int) -> TokenLayout:
    """References of the given grids (or, for an int, that many tokens without one) after 4 generation tokens."""
    at, references = 4, []
    for shape in shapes:
        length = shape if isinstance(shape, int) else math.prod(shape)
        references.append(Reference(at, length, None if isinstance(shape, int) else shape))
        at += length
    return TokenLayout(at, 0, (0, 4), tuple(references))


def step_of(index: int, layout: TokenLayout, kept: list[int], kind: str = "sparse", seconds: float = 0.0) -> StepRecord:
    selection = RefSelection(torch.tensor(kept, dtype=torch.int64), layout.sizes)
    return StepRecord(index, kind, len(kept), 1, lambda: seconds, 0.0, selection)


def dense_step(index: int, layout: TokenLayout, kind: str = "profile", seconds: float = 0.0) -> StepRecord:
    return StepRecord(index, kind, layout.reference_tokens, 1, lambda: seconds)


@pytest.fixture
def run() -> RunRecord:
    """A 2 x 2 reference and one of 4 tokens without a grid; profile, dense, two sparse steps."""
    layout = layout_of((2, 2), 4)
    record = RunRecord(layout, 1, 4, notes=["the guard kept | more"], config={"keep": 0.25})
    record.steps = [
        dense_step(0, layout, "profile", 3.0),
        dense_step(1, layout, "dense", 2.0),
        step_of(2, layout, [0, 3, 4], seconds=0.75),
        step_of(3, layout, [3], seconds=0.25),
    ]
    for step in record.steps:
        step.host_seconds = 0.002
    record.mass = [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 0.5, 0.5, 0.5])]
    record.scores = record.mass
    return record


def test_summary_numbers_are_those_worked_out_by_hand(run):
    got = summary(run, "dict", FlopSummary(100.0, 40.0, bound_seconds=5.7), dense_seconds=9.0)
    first, second = got["references"]
    # Kept of the first reference: 4, 4, 2, 1; of the second: 4, 4, 1, 0.
    assert (first["kept_min"], first["kept_mean"], first["kept_max"]) == (1, 2.75, 4)
    assert (second["kept_min"], second["kept_mean"], second["kept_max"]) == (0, 2.25, 4)
    assert (first["grid"], second["grid"]) == ([2, 2], None)
    assert first["mass_kept"] == pytest.approx((0.5 + 0.4) / 2)
    assert second["mass_kept"] == pytest.approx((0.25 + 0.0) / 2)
    assert got["steps"] == {
        "planned": 4, "ran": 4, "profile": 1, "in_flight": 0, "dense": 1, "sparse": 2, "cached": 0,
    }  # fmt: skip
    assert got["reference_tokens"] == {"all": 8, "mean_per_step": 5.0, "share": 0.625}
    assert got["seconds"]["total"] == 6.0
    assert got["seconds"]["per_sparse_step"] == 0.5
    assert got["seconds"]["per_cached_step"] is None
    assert got["speedup"] == {"sparse_step": 4.0, "run": 1.5, "dense_seconds": 9.0}
    assert got["host_ms_per_step"] == pytest.approx(2.0)
    assert got["flops"]["ratio"] == 2.5
    assert got["flops"]["bound_speedup"] == pytest.approx(9 / 5.7)
    assert got["flops"]["measured_over_bound"] == pytest.approx(0.95)
    assert got["by_step"]["kept"] == [8, 8, 3, 1]


def test_tokens_that_leave_by_depth_count_in_the_blocks_before():
    layout = layout_of((2, 2), (1, 4))
    steps = [step_of(0, layout, [0, 4, 5]), step_of(1, layout, [0, 4])]
    steps[0].kind, steps[0].from_block = "in_flight", 2
    record = RunRecord(layout, 1, 2, steps=steps, blocks=8)
    record.mass = [torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.1, 0.1, 0.4, 0.4])]
    got = summary(record, "dict")
    first, second = got["references"]
    # Step 0: 4 in two blocks of eight, then 1 and 2; step 1: 1 and 1.
    assert (first["kept_min"], first["kept_mean"], first["kept_max"]) == (1, 1.375, 1.75)
    assert (second["kept_min"], second["kept_mean"], second["kept_max"]) == (1, 1.75, 2.5)
    assert got["reference_tokens"]["mean_per_step"] == ((2 * 8 + 6 * 3) / 8 + 2) / 2
    assert (got["by_step"]["kept"], got["by_step"]["from_block"]) == ([3, 2], [2, 0])
    assert got["steps"]["in_flight"] == 1
    assert (first["mass_kept"], second["mass_kept"]) == (0.5, pytest.approx(0.15))
    assert "1 in flight, 1 sparse" in summary(record)


def test_what_was_not_measured_is_never_a_number():
    layout = layout_of((2, 2))
    record = RunRecord(layout, 1, 3, steps=[dense_step(0, layout), step_of(1, layout, [0], seconds=0.5)])
    got = summary(record, "dict")
    assert got["references"][0]["mass_kept"] is None
    assert got["seconds"]["total"] is None  # step 0 has no time, so the whole run has none
    assert got["seconds"]["per_sparse_step"] == 0.5
    assert got["speedup"] == {"sparse_step": None, "run": None, "dense_seconds": None}
    assert got["host_ms_per_step"] is None
    assert got["flops"] is None
    text = summary(record)
    for name in ("speed-up of a sparse step", "speed-up of the whole run", "FLOP ratio", "bound", "library host time"):
        line = next(line for line in text.splitlines() if line.startswith(f"  {name}"))
        assert line.split()[-1] == "-"
    assert "2 of 3 planned" in text


def test_a_profile_step_is_no_dense_step(run):
    run.steps = [step for step in run.steps if step.kind != "dense"]
    assert summary(run, "dict")["speedup"]["sparse_step"] is None


def test_cached_steps_without_a_selection_are_not_guessed():
    layout = layout_of((2, 2), (1, 4))
    record = RunRecord(layout, 1, 2, steps=[step_of(0, layout, [0, 4]), StepRecord(1, "cached", 2)])
    record.mass = [torch.ones(4), torch.ones(4)]
    row = summary(record, "dict")["references"][0]
    assert (row["kept_mean"], row["mass_kept"]) == (None, None)
    one = layout_of((2, 2))
    record = RunRecord(one, 1, 2, steps=[step_of(0, one, [0]), StepRecord(1, "cached", 3)])
    assert summary(record, "dict")["references"][0]["kept_mean"] == 2.0


def test_json_is_the_dict(run):
    flops = FlopSummary(2.0, 1.0)
    assert json.loads(summary(run, "json", flops, 3.0)) == summary(run, "dict", flops, 3.0)


def test_text_is_aligned_and_fits_a_terminal(run):
    run.notes = ["a long note " * 30]
    text = summary(run, flops=FlopSummary(12345.678, 4000.0, 5.7), dense_seconds=9.0)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    header, rule, first, second = lines[1:5]
    ends = [i for i in range(len(rule)) if rule[i] == "-" and rule[i + 1 : i + 2] != "-"]
    for line in (header, first, second):  # every column but the grid ends where its rule ends
        assert all(line[end] != " " for end in ends[:1] + ends[2:])
    assert "2.8 (68.8 %)" in first
    assert "profile 3.00 s, dense 2.00 s, sparse 500 ms" in text
    assert "1.50x over 9.00 s dense" in text
    assert "measured speed is 0.95 of the bound's" in text


def test_markdown_tables_have_whole_rows(run):
    lines = summary(run, "markdown").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert [line.count("|") for line in tables] == [8] * 4 + [3] * (len(tables) - 4)
    assert "| 1 | 2 x 2 | 4 | 1 (25 %) | 2.8 (68.8 %) | 4 (100 %) | 45 % |" in lines
    assert "- the guard kept | more" in lines


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda r: r.steps.clear(), LayoutError, "got 0 steps"),
        (lambda r: setattr(r, "layout", TokenLayout(8, 0, (0, 8), ())), LayoutError, "0 references"),
        (lambda r: setattr(r, "layout", layout_of((2, 3), 4)), LayoutError, r"references of \(6, 4\) tokens"),
        (lambda r: setattr(r, "mass", [torch.ones(4)]), LayoutError, "mass must have"),
    ],
)
def test_summary_of_a_broken_run_says_what_is_wrong(run, change, error, words):
    change(run)
    with pytest.raises(error, match=words):
        summary(run)


def test_settings_out_of_range_are_refused(run):
    with pytest.raises(ConfigError, match="yaml"):
        summary(run, "yaml")
    with pytest.raises(ConfigError, match="dense_seconds"):
        summary(run, dense_seconds=0.0)
    with pytest.raises(ConfigError, match="dense_seconds must be finite and above 0, got 'fast'"):
        summary(run, dense_seconds="fast")
    for bad in ((0.0, 1.0), (1.0, math.nan), (1.0, 1.0, -2.0)):
        with pytest.raises(ConfigError, match="above 0"):
            FlopSummary(*bad)


def test_attention_table_means_match_the_full_tensor():
    steps, blocks, references, heads = 2, 3, 2, 4
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, steps, blocks, references, heads, generator=generator, dtype=torch.float64)
    record = RunRecord(layout_of((2, 2), 8), 1, 2)
    record.attention = [
        BlockAttention(s, b, *(values[i, s, b].float() for i in range(3))) for s in range(steps) for b in range(blocks)
    ]
    table = attention_table(record)
    for i, name in enumerate(("mass", "entropy", "top_quarter")):
        v = values[i].float().double()
        assert table["by_step"][name] == pytest.approx(v.mean((1, 2, 3)).tolist())
        assert table["by_block"][name] == pytest.approx(v.mean((0, 2, 3)).tolist())
        assert table["by_reference"][name] == pytest.approx(v.mean((0, 1, 3)).tolist())
        assert table["by_head"][name] == pytest.approx(v.mean((0, 2)).flatten().tolist())
        assert table["each"][name] == pytest.approx(v.flatten().tolist())
    assert table["by_reference"]["reference"] == [1, 2]
    assert table["by_reference"]["entropy_uniform"] == [2.0, 3.0]
    assert table["by_head"]["head"] == [0, 1, 2, 3] * blocks
    assert len(table["text"].splitlines()) == (2 + steps) + 1 + (2 + references) + 1 + (2 + blocks)
    json.dumps(table, allow_nan=False)


def test_attention_that_is_not_finite_is_left_out_of_the_means():
    record = RunRecord(layout_of((2, 2)), 1, 1)
    entropy = torch.tensor([[1.0, math.nan]])
    record.attention = [BlockAttention(0, 0, torch.ones(1, 2), entropy, entropy)]
    table = attention_table(record)
    assert table["by_step"]["entropy"] == [1.0]
    assert table["each"]["entropy"] == [1.0, None]


def test_attention_table_needs_a_profiled_run(run):
    with pytest.raises(ConfigError, match="profiling step"):
        attention_table(run)


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
        return np.asarray(image.convert("RGB")).astype(int)


def near(picture: np.ndarray, colour: tuple[float, ...], within: int) -> np.ndarray:
    return (np.abs(picture - np.array(colour)) <= within).all(-1)


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


def test_a_ranking_of_one_token_has_no_rank_correlation(run):
    run.stability.append(Stability(2, (math.nan, 0.5), 0.75))
    assert json.loads(summary(run, "json"))["stability"][0]["spearman"] == [None, 0.5]
    assert "rank correlation 0.50 to 0.50" in summary(run)
    run.stability[0] = Stability(2, (math.nan, math.nan), 0.75)
    assert "rank correlation undefined, 75 % or more of the kept stayed" in " ".join(summary(run).split())
