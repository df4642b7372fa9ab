"""The pictures show the rows: what is measured as a line, its bound dashed, nothing that was not measured."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from benchmarks import plots, results
from benchmarks.cli import main
from sparse_ref_attn import ConfigError
from sparse_ref_attn.vocabulary import MODELS

CACHE = results.RESULTS / "cache_cpu.csv"


def lines(figure, label: str) -> list[tuple[list[float], list[float]]]:
    """(x, y) of the line of that label, and of the dashed one drawn after it, panel by panel."""
    found = []
    for axes in figure.get_axes():
        drawn = axes.get_lines()
        at = next(i for i, line in enumerate(drawn) if line.get_label() == label)
        found.append([(list(line.get_xdata()), list(line.get_ydata())) for line in drawn[at : at + 2]])
    return found


def test_speed_up_over_the_kept_ratio_with_its_bound():
    rows = plots.latest(results.read(CACHE))
    figure = plots.draw(rows, "kept")
    by_panel = lines(figure, "dropped, stored and read")
    assert len(by_panel) == 3
    for references, (measured, bound) in zip((1, 2, 4), by_panel, strict=True):
        own = {row["method"]: row for row in rows if row["references"] == str(references)}
        dense = float(own["dense"]["seconds_median"])
        assert measured[0] == bound[0] == [10, 25, 50]
        for share, speedup, limit in zip(*measured, bound[1], strict=True):
            row = own[f"both {share:.0f}%"]
            assert speedup == pytest.approx(dense / float(row["seconds_median"]), rel=5e-3)
            assert limit == pytest.approx(dense / float(row["bound_seconds"]), rel=5e-3)


def test_panels_say_models_sizes_and_units_in_words():
    axes = plots.draw(plots.latest(results.read(CACHE)), "kept").get_axes()
    counts = ("1 reference", "2 references", "4 references")
    assert [each.get_title() for each in axes] == [f"FLUX.2 Klein 9B\n{count}" for count in counts]
    assert axes[0].get_ylabel().startswith("speed-up of the whole call, x")
    assert {each.get_xlabel() for each in axes} == {"reference tokens kept, % of all"}
    assert set(plots.NAMES) == set(MODELS)


def test_the_latest_row_of_a_call_counts():
    row = {name: "1" for name in results.COLUMNS} | {"model": "m", "method": "edges 25%"}
    assert plots.latest([row | {"speedup": "3"}, row | {"speedup": "2"}]) == [row | {"speedup": "2"}]


def test_memory_is_drawn_where_it_was_measured():
    row = {name: "1" for name in results.COLUMNS} | {"model": "m", "method": "edges 25%"}
    assert plots.draw([row | {"peak_mb": ""}], "memory") is None
    figure = plots.draw([row | {"peak_mb": "2500"}, row | {"peak_mb": "5000", "method": "dense"}], "memory")
    assert [bar.get_width() for bar in figure.get_axes()[0].patches] == [2.5, 5.0]


@pytest.mark.parametrize(("name", "column"), [("side", "side"), ("batch", "batch"), ("references", "references")])
def test_scaling(name: str, column: str):
    row = {name: "1" for name in results.COLUMNS} | {"model": "m", "method": "edges 25%", "measured_over_bound": "0.5"}
    rows = [row | {column: str(at), "speedup": str(at)} for at in (4, 1, 2)]
    ((measured, bound),) = lines(plots.draw(plots.latest(rows), name), "edges 25%")
    assert measured == ([1, 2, 4], [1.0, 2.0, 4.0])
    assert bound == ([1, 2, 4], [2.0, 4.0, 8.0])


def test_pictures_of_the_committed_rows(tmp_path: Path):
    """All are drawn, and of two files those of the first two calls are written."""
    drawn = set()
    for stem in plots.STEMS:
        rows = plots.latest(results.known(results.RESULTS / f"{stem}_cpu.csv"))
        drawn |= {f"{stem}_cpu_{name}.png" for name in plots.PLOTS if rows and plots.draw(rows, name) is not None}
        if stem not in ("cache", "scaling"):
            continue
        calls = list(dict.fromkeys((row["model"], row["references"], row["side"], row["batch"]) for row in rows))[:2]
        few = [row for row in rows if (row["model"], row["references"], row["side"], row["batch"]) in calls]
        results.append(few, tmp_path / "rows" / f"{stem}_cpu.csv")
    assert {"pipeline_cpu_kept.png", "cache_cpu_kept.png", "cache_cpu_cache_memory.png"} <= drawn
    assert main(["plots", "--results", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]) == 0
    written = list((tmp_path / "out").iterdir())
    assert {path.name for path in written} <= drawn
    assert {path.name.split("_")[0] for path in written} == {"cache", "scaling"}
    assert len(written) > 3
    for path in written:
        with PIL.Image.open(path) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("L").getcolors(256)) > 20, path.name
    with pytest.raises(ConfigError, match="plots need rows of whole pipelines, got none of cuda"):
        main(["plots", "--device", "cuda", "--results", str(tmp_path)])
