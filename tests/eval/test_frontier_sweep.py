"""The frontier's sweep: half of the settings go on at each rung, a stopped run too, and its points are its rows."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sparse_ref_attn as sra
from sparse_ref_attn.candidates import CANDIDATES, DENSE
from sparse_ref_attn.cli import frontier as drawing
from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.examples import procedural
from sparse_ref_attn.eval.frontier import figure as panels
from sparse_ref_attn.eval.frontier import sweep, table
from sparse_ref_attn.eval.frontier.figure import best_of, figure
from sparse_ref_attn.eval.frontier.listed import STEP_CACHES, all_settings, setting_of
from sparse_ref_attn.eval.frontier.points import Losses, Lost, losses_of
from sparse_ref_attn.eval.frontier.sweep import survivors
from sparse_ref_attn.eval.frontier.table import markdown, speed
from sparse_ref_attn.eval.metrics import Interval, SceneryContrast, SceneryPsnr
from sparse_ref_attn.frontier import Point, read_points
from sparse_ref_attn.models import named_model
from sparse_ref_attn.vocabulary import OPEN_SCENERY
from tests.small_model import looking_transformer

SUBJECT, PICTURE = "subject PSNR (dB) vs target", "PSNR (dB) vs dense"
KEYS = ["stored-once", "edges-25", "taylorseer-lite-2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer that is not trained, and does look at its references."""
    folder = tmp_path_factory.mktemp("model")
    looking_transformer().save_pretrained(folder)
    return folder


def compare_one_size(patch: pytest.MonkeyPatch) -> None:
    """From here on the work of a setting is known at the sizes of one published model."""
    for where in (sweep, table, drawing):
        patch.setattr(where, "GEOMETRIES", (("kontext", 1), ("kontext", 4)))


def command(out: Path, model: Path) -> list[str]:
    return [
        "eval", "--frontier", "--out", str(out), "--models", f"one={model}", "--side", "64", "--steps", "4",
        "--families", "subject-driven", "--subjects", "2", "--seeds", "2", "--first", "1", "--candidates", *KEYS,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("frontier")
    with pytest.MonkeyPatch.context() as patch:
        compare_one_size(patch)
        assert main(command(out, model)) == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "rows.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_setting_is_run_and_the_better_half_goes_on(done: Path) -> None:
    settings = all_settings(4, KEYS)
    counts = Counter((row["method"], round(4 * float(row["keep"]))) for row in rows(done))
    assert set(counts) == {*settings, (DENSE, 4)}
    assert all(count in (1, 4) for count in counts.values())  # one seed, then two
    on = {key for key in settings if counts[key] == 4}
    assert len(on) == -(-len(settings) // 2)
    assert {key for key in counts if key[0] == DENSE} - {(DENSE, 4)} < on
    assert ("stored-once", 4) in on
    assert counts[DENSE, 4] == 4


def test_a_stopped_sweep_goes_on(done: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of both rungs are lost; what is made anew is what was there. Nothing is drawn."""
    monkeypatch.setattr(drawing, "figure", lambda *arguments, **settings: None)
    compare_one_size(monkeypatch)
    whole, points = (done / "rows.csv").read_bytes(), (done / "frontier.csv").read_bytes()
    lines = whole.splitlines(keepends=True)
    (done / "rows.csv").write_bytes(b"".join(line for i, line in enumerate(lines) if i % 4 != 3))
    assert main(command(done, model)) == 0
    assert (done / "rows.csv").read_bytes() == whole
    assert (done / "frontier.csv").read_bytes() == points
    columns = rows(done)[0]
    praised = [row | {"seed": "7", PICTURE: "99"} for row in rows(done) if row["method"] == "edges-25"]
    with (done / "rows.csv").open("a", newline="") as file:
        csv.DictWriter(file, columns, lineterminator="\n").writerows(praised)
    assert main(command(done, model)) == 0
    assert (done / "frontier.csv").read_bytes() == points  # those of another sweep change nothing
    (done / "rows.csv").write_bytes(whole)


def test_points_are_paired_differences(done: Path) -> None:
    points = {(p.setting, p.steps, p.references): p for p in read_points(done / "frontier.csv")}
    assert {p.base_steps for p in points.values()} == {4}
    values = {(row["method"], round(4 * float(row["keep"])), row["example"], row["seed"]): row for row in rows(done)}
    for (key, steps, references), point in points.items():
        own = {tuple(name): row for (method, ran, *name), row in values.items() if (method, ran) == (key, steps)}
        own = {name: row for name, row in own.items() if name[0].startswith("pair/" if references == 2 else "place/")}
        lost = [float(row[SUBJECT]) - float(values[(DENSE, 4, *name)][SUBJECT]) for name, row in own.items()]
        assert point.loss_db == pytest.approx(np.mean(lost), abs=6e-4)
        assert point.dense_db == pytest.approx(np.mean([float(row[PICTURE]) for row in own.values()]), abs=6e-3)
        assert (point.examples, point.seeds) == (len({name for name, _ in own}), len({seed for _, seed in own}))
    text = (done / "frontier.md").read_text()
    assert '`sra.patch(pipe, sra.SparseRef("edges", 0.25))`; `pipe(..., num_inference_steps=3)`' in text
    with Image.open(done / "frontier-kontext.png") as drawn:
        assert np.asarray(drawn.convert("L")).std() > 5


def test_who_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that are as fast the better one; what is good in one measure stays; the dense run always.

    What a patch alone can be, in all steps, is held against its like.
    """
    monkeypatch.setattr(sweep, "GEOMETRIES", (("kontext", 1),))
    keys = ["stored-once", "stored-halves", "edges-25", "mass-25"]
    settings = {key: setting for key, setting in all_settings(12, keys).items() if key[1] == 12 or key == (DENSE, 2)}

    def lost(loss: float, picture: float) -> Losses:
        return Losses({("any", 1): Lost(Interval(loss, loss - 0.1, loss + 0.1), picture, 8, 1)})

    losses = {
        (DENSE, 2): lost(-9.0, 10.0),
        ("stored-once", 12): lost(-0.5, 28.0),
        ("stored-halves", 12): lost(0.1, 30.0),
        ("edges-25", 12): lost(-5.0, 12.0),  # as fast as stored-once
        ("mass-25", 12): lost(-4.0, 15.0),
    }
    assert survivors(settings, losses, 12) == {(DENSE, 2), ("stored-once", 12), ("stored-halves", 12)}
    losses["edges-25", 12] = lost(-5.0, 40.0)
    assert ("edges-25", 12) in survivors(settings, losses, 12)
    better = setting_of("stored-once", 6)
    settings["stored-once", 6], losses["stored-once", 6] = better, lost(1.0, 50.0)
    assert survivors(settings, losses, 12) >= {("stored-once", 12), ("stored-halves", 12), ("edges-25", 12)}
    faster = setting_of("tiles-16th-once")
    assert faster.flop_ratio(12, "kontext", 1) > settings["stored-once", 12].flop_ratio(12, "kontext", 1)
    settings["tiles-16th-once", 12], losses["tiles-16th-once", 12] = faster, lost(0.5, 60.0)
    left = survivors(settings, losses, 12)
    assert ("tiles-16th-once", 12) in left
    assert ("stored-once", 12) in left  # the other is held back: nobody could choose it


def test_what_of_open_scenery_is_not_drawn() -> None:
    """A loss is the contrast's, in dB: PSNR to the nearest texture would praise a flat grey."""
    data = procedural(families=[OPEN_SCENERY])
    name = next(key for key, _ in data.keys if key.startswith("open/"))
    other = next(key for key, _ in data.keys if key.startswith("open/") and key != name)

    def row(example: str, keep: float, contrast: float) -> dict[str, str]:
        about = {"model": "m", "family": OPEN_SCENERY, "example": example, "seed": "0", "method": DENSE}
        values = {SUBJECT: "20", PICTURE: "15", SceneryPsnr.name: "13", SceneryContrast.name: str(contrast)}
        return about | values | {"keep": str(keep)}

    rows = [row(name, 1.0, 0.2), row(other, 1.0, 0.1), row(name, 0.5, 0.02), row(other, 0.5, 0.1)]
    found = losses_of(rows, data, "m", 12)[DENSE, 6].groups[OPEN_SCENERY, 1]
    assert found.loss.mean == pytest.approx(-10.0)
    assert found.picture == 15.0


def test_what_is_listed() -> None:
    settings = all_settings(12)
    beside = {f"stored-once+{key}" for key in STEP_CACHES}
    assert {key for key, _ in settings} == {DENSE, *CANDIDATES, *STEP_CACHES, *beside}
    assert (DENSE, 12) not in settings
    assert ("stored-sixths", 6) not in settings  # computed in every step
    assert ("stored-sixths", 8) in settings
    assert settings["stored-once", 6] == setting_of("stored-once", 6)
    assert settings["stored-once", 12].steps is None
    with pytest.raises(ConfigError, match=r"candidates must be among stored-sixths, .*, got magic"):
        all_settings(12, ["magic"])


def test_nothing_beats_what_is_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "REFERENCES", (1,))
    places = {("a", 1, 2): (1.0, 3.0), ("b", 1, 2): (2.0, 2.0), ("c", 1, 2): (1.5, 1.5), ("d", 1, 2): (3.0, 2.0)}
    assert best_of(places) == [("a", 1, 2), ("d", 1, 2)]
    points = [
        Point("stored-once", "x", "any", 1, 12, 12, -0.1, -0.2, 0.0, 30.0, 8, 1, "w"),
        Point("edges-25", "y", "any", 1, 12, 12, -5.0, -6.0, -4.0, 20.0, 8, 1, "w"),
        Point(DENSE, "z", "any", 1, 12, 6, -9.0, -9.5, -8.5, 10.0, 8, 1, "w"),
        Point("another", "z", "any", 1, 12, 6, -9.0, -9.5, -8.5, 10.0, 8, 1, "w"),
    ]
    assert figure(points, tmp_path / "f.png") == ["stored-once"]
    scenery = [
        replace(points[1], family=OPEN_SCENERY, loss_db=0.0, dense_db=90.0),
        replace(points[0], family=OPEN_SCENERY),
    ]
    assert figure([*points, *scenery], tmp_path / "g.png") == ["edges-25", "stored-once"]
    heights = [Image.open(tmp_path / f"{name}.png").height for name in "fg"]
    assert heights[1] > 1.4 * heights[0]
    lines = markdown(points).splitlines()
    assert len(lines) == 2 + 3  # of what can be made here
    assert speed(("stored-once", 12, 12), "kontext", 1) == pytest.approx(
        sra.estimate(named_model("kontext"), CANDIDATES["stored-once"], steps=12).flop_ratio
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--frontier", "--rules", "edges"], "--frontier sweeps its own list"),
        (["--candidates", "stored-once"], "--candidates and --first must come with --frontier"),
        (["--frontier", "--models", "a=b", "c=d"], "--frontier must come with one model, got 2"),
    ],
)
def test_what_does_not_go_together(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--out", "never", *given]) == 2
    assert words in capsys.readouterr().err
