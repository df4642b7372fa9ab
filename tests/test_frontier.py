"""The rows that presets and plans are chosen from, and that the presets are what the rule chooses on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sparse_ref_attn as sra
from benchmarks.evaluated_points import EVALUATED, evaluated_points
from sparse_ref_attn.candidates import CANDIDATES, held_back
from sparse_ref_attn.eval.frontier.listed import setting_of
from sparse_ref_attn.eval.methods import methods
from sparse_ref_attn.frontier import FRONTIER, loss_of, read_points, write_points
from sparse_ref_attn.models import named_model
from sparse_ref_attn.planning import fastest_within, known
from sparse_ref_attn.presets import CHOSEN
from sparse_ref_attn.source import source

POINTS = read_points()
MODELS = {
    "kontext": {"num_layers": 2, "num_single_layers": 4},
    "klein-9b": {"num_layers": 2, "num_single_layers": 6},
    "qwen-image-edit": {"num_layers": 6},
}
"""Cut in depth alone, which hardly changes a ratio."""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return named_model(request.param, **MODELS[request.param])


def speeds(model: Any, references: int, steps: int) -> dict[str, float]:
    sizes = [(1024, 1024)] * (1 if type(model).__name__.startswith("FluxT") else references)
    return {key: sra.estimate(model, CANDIDATES[key], references=sizes, steps=steps).flop_ratio for key in known(steps)}


@pytest.mark.parametrize(("references", "steps"), [(1, 12), (4, 12), (2, 28)])
def test_each_preset_is_the_fastest_within_its_bounds(model: Any, references: int, steps: int) -> None:
    found, losses = speeds(model, references, steps), known(steps)
    assert {name: fastest_within(choice, found, losses) for name, choice in CHOSEN.items()} == {
        name: choice.key for name, choice in CHOSEN.items()
    }


def test_no_other_candidate_beats_a_preset_at_its_speed_by_more_than_the_interval(model: Any) -> None:
    found = speeds(model, 1, 12)
    for name, choice in CHOSEN.items():
        own = {(p.family, p.references): p for p in POINTS if p.setting == choice.key and p.steps == p.base_steps}
        assert own
        for other in POINTS:
            if found.get(other.setting, 0.0) < found[choice.key] or other.steps < other.base_steps:
                continue
            mine = own.get((other.family, other.references))
            assert mine is None or other.low <= mine.high, f"{other.setting} beats {name} at {other.family}"


def test_a_preset_that_is_beaten_is_found_out(model: Any) -> None:
    """The rule would not have the slower one, nor one that loses more, nor one whose picture is another."""
    losses = known(12) | {"stored-sixths": replace(known(12)["stored-halves"], low=-1.2)}
    found = speeds(model, 1, 12) | {"stored-sixths": 9.0}
    assert fastest_within(CHOSEN["fast"], found, losses) == "stored-sixths"
    assert fastest_within(CHOSEN["balanced"], found, losses) == "stored-halves"
    assert fastest_within(replace(CHOSEN["balanced"], loss_db=1.2), found, losses) == "stored-sixths"
    assert fastest_within(replace(CHOSEN["balanced"], picture_db=99.0), found, losses) is None


def test_every_row_is_of_a_setting_and_says_how_to_make_it() -> None:
    for point in POINTS:
        assert setting_of(point.setting) is not None
        if point.setting in CANDIDATES:
            assert f"sra.patch(pipe, {source(CANDIDATES[point.setting])})" in point.code
        assert point.low <= point.loss_db <= point.high
        assert (point.steps < point.base_steps) == ("num_inference_steps" in point.code)


@pytest.mark.parametrize("key", CANDIDATES)
def test_the_source_of_a_candidate_makes_it_again(key: str) -> None:
    assert eval(source(CANDIDATES[key]), {"sra": sra}) == CANDIDATES[key]


@pytest.mark.parametrize("key", EVALUATED)
def test_the_rows_of_the_evaluation_are_of_the_candidates(key: str) -> None:
    method, keep = EVALUATED[key]
    assert methods(float(keep), [method])[method] == CANDIDATES[key]


def test_the_file_holds_the_rows_of_the_evaluation() -> None:
    assert set(evaluated_points()) <= set(POINTS)


def test_what_has_not_been_timed_is_measured_and_not_chosen() -> None:
    assert held_back(CANDIDATES["tiles-8th-halves"]) != "" == held_back(CANDIDATES["mass-25"])
    assert loss_of(POINTS, "tiles-8th-halves", 12) is not None
    assert not any("tiles" in key for key in known(12))


def test_a_loss_is_that_of_the_worst_family_at_the_nearest_number_of_steps() -> None:
    given = [("x", 12, 12, -1.0, 30.0), ("y", 12, 12, -2.0, None), ("x", 4, 4, -9.0, 20.0), ("x", 12, 6, -3.0, 25.0),
             ("x", 12, 3, -4.0, 24.0)]  # fmt: skip
    rows = [
        replace(POINTS[0], setting="a", family=family, base_steps=base, steps=steps, loss_db=db, low=db - 1,
                high=db + 1, dense_db=picture)
        for family, base, steps, db, picture in given
    ]  # fmt: skip
    open_ended = replace(rows[0], loss_db=None, low=None, high=None)
    found = loss_of([*rows, open_ended], "a", 28)
    assert (found.db, found.low, found.high, found.dense_db, found.base_steps) == (-2.0, -3.0, -1.0, 30.0, 12)
    assert loss_of(rows, "a", 5).db == -9.0
    assert [loss_of(rows, "a", 28, own).db for own in (15, 8, 27)] == [-3.0, -4.0, -3.0]
    assert loss_of(rows, "a", 28, 28).db == -2.0
    assert loss_of([open_ended], "a", 28) is None


def test_open_scenery_has_a_loss_of_its_own() -> None:
    """Contrast that is not drawn is no PSNR that is lost."""
    own = replace(POINTS[0], setting="a", base_steps=12, steps=12, loss_db=-1.0, low=-1.2, high=-0.8, dense_db=30.0)
    scenery = replace(own, family="open scenery", loss_db=-6.0, low=-7.0, high=-5.0, dense_db=15.0)
    fewer = [replace(point, steps=6, loss_db=point.loss_db - 1) for point in (own, scenery)]
    found = loss_of([scenery, own, *fewer], "a", 28)
    assert (found.db, found.dense_db, found.open_db) == (-1.0, 30.0, -6.0)
    assert found.words == "-1.0 dB [-1.2, -0.8], 30.0 dB to the dense picture, contrast of open scenery -6.0 dB"
    assert loss_of([scenery, own, *fewer], "a", 28, 14).open_db == -7.0
    assert loss_of([own], "a", 28).open_db is None
    assert loss_of([scenery], "a", 28) is None


def test_only_what_was_measured_to_the_end_is_chosen() -> None:
    whole = replace(POINTS[0], setting="stored-once", base_steps=12, steps=12, seeds=3)
    rows = [whole, replace(whole, setting="stored-halves", seeds=1)]
    assert set(known(12, rows)) == {"stored-once"}
    assert set(known(12, rows[1:])) == {"stored-halves"}


def test_rows_are_read_as_they_were_written_and_a_wrong_file_is_named(tmp_path: Path) -> None:
    rows = [replace(POINTS[0], loss_db=None, low=None, high=None, dense_db=None), *POINTS[1:4]]
    write_points(rows, tmp_path / "rows.csv")
    assert list(read_points(tmp_path / "rows.csv")) == rows
    lines = FRONTIER.read_text("utf-8").splitlines()
    (tmp_path / "cut.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    with pytest.raises(sra.ConfigError, match="must have the columns of a frontier, got none named weights"):
        read_points(tmp_path / "cut.csv")
    (tmp_path / "half.csv").write_text("\n".join([lines[0], "dense,x,y,1,12,6,0.2,,0.3,40,1,1,a"]))
    with pytest.raises(sra.ConfigError, match="line 2, must hold numbers of a frontier, got"):
        read_points(tmp_path / "half.csv")
