"""The study of fewer dense steps: its rows are the pipeline's pictures, its table their means and differences."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest

from benchmarks.fewer_steps import agreement, fewer_steps
from benchmarks.studies import fewer_steps as module
from benchmarks.studies.fewer_steps import KEYS, STEPS, STUDY, VALUES
from benchmarks.studies.generator import Generator
from benchmarks.studies.questions import Question
from sparse_ref_attn.eval.metrics import SceneryPsnr
from sparse_ref_attn.eval.models import EvalModel
from sparse_ref_attn.eval.rows import Rows
from sparse_ref_attn.toy.textures import KINDS
from tests.small_model import looking_transformer


def measured(tmp_path, transformer, seeds):
    generator = Generator(EvalModel("dense", str(transformer), steps=2))
    STUDY.measure(tmp_path / "fewer_steps.csv", {"dense": generator}, 1, seeds)
    with (tmp_path / "fewer_steps.csv").open() as file:
        return generator, list(csv.DictReader(file))


@pytest.fixture
def two(monkeypatch):
    """At most two steps, so that it takes seconds."""
    monkeypatch.setattr(module, "STEPS", (2, 1))


@pytest.fixture
def knowing(tmp_path):
    """Weights in a folder that says that they know open scenery."""
    folder = tmp_path / "transformer"
    looking_transformer().save_pretrained(folder)
    (folder / "sparse_ref_attn.json").write_text(json.dumps({"open_scenery": 0.5}))
    return folder


def test_rows_are_what_the_pipeline_draws(tmp_path, two, knowing):
    generator, rows = measured(tmp_path, knowing, 1)
    assert {(row["task"], row["steps"]) for row in rows} == {
        (task, steps) for task in ("place", "pair", "swap", "open", "open-pair") for steps in "12"
    }
    for row in rows:
        left_open = row["task"].startswith("open")
        assert bool(row["psnr"]) == (not left_open)
        assert bool(row["scenery_psnr"]) == left_open
        assert (row["kind"] in KINDS) == left_open
        assert bool(row["dense_psnr"]) == (row["steps"] == "1")
    one = next(row for row in rows if (row["task"], row["steps"]) == ("open", "1"))
    question = Question("open", 0)
    picture = generator.picture(question, 0, steps=1)
    hidden = question.scene.mask > 0
    near = SceneryPsnr(hidden)(picture)  # its edge counts here
    assert float(one["scenery_psnr"]) == pytest.approx(near, abs=1.5)
    assert float(one["contrast"]) == pytest.approx(np.std(picture[~hidden], axis=0).mean(), abs=0.05)
    assert float(one["task_contrast"]) > 0.1  # of two different colours
    other = generator.picture(question, 0, steps=2)
    assert float(one["dense_psnr"]) == pytest.approx(-10 * np.log10(np.square(picture - other).mean()), abs=0.01)


def test_weights_that_do_not_know_open_scenery_are_not_asked(tmp_path, two, knowing):
    (knowing / "sparse_ref_attn.json").unlink()
    _, rows = measured(tmp_path, knowing, 2)
    asked = itertools.product(("place", "pair", "swap"), "12", "01")
    assert {(row["task"], row["steps"], row["seed"]) for row in rows} == set(asked)
    assert len({row["psnr"] for row in rows}) == len(rows)  # each seed has pictures of its own


def test_the_table_has_means_differences_and_agreements(tmp_path):
    rows = Rows(tmp_path / "fewer_steps.csv", (*KEYS, *VALUES), keys=KEYS)
    for subject in range(3):
        for seed in range(2):
            for i, steps in enumerate(STEPS):
                key = {"model": "dense", "weights": "abc", "steps": steps, "subject": subject, "seed": seed}
                rows.add([{**key, "task": "place", "subject_psnr": 20.0 + subject - i / 10, "psnr": 21.0}])
                drawn = {"kind": "dots" if subject else KINDS[seed], "first": seed, "second": 1 - seed}
                drawn |= {"scenery_psnr": 25.0 - i, "contrast": 0.1 * subject - i / 100, "task_contrast": 0.3}
                rows.add([{**key, "task": "open", "subject_psnr": 19.0, **drawn}])
    text = fewer_steps(tmp_path)
    assert "Weights abc, 6 subjects and seeds" in text
    lines = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in text.splitlines() if line.startswith("| ")}
    assert lines["| place", "subject"][0] == "21.0"
    assert lines["| place", "subject"][1].startswith("-0.10 (")
    assert [cell.split()[0] for cell in lines["| open scenery", "scenery"][:-1]] == [
        "25.0", "-1.00", "-2.00", "-3.00", "-4.00",
    ]  # fmt: skip
    assert ("| open scenery", "picture") not in lines
    contrasts = lines["| open scenery", "contrast, in the task 0.300"]
    assert [cell.strip("| ") for cell in contrasts] == ["0.100", "0.090", "0.080", "0.070", "0.060", "0.050"]
    assert lines["| open scenery", "same kind from two seeds"][0] == "67 %"
    assert lines["| open scenery", "same colours from two seeds"][0] == "100 %"
    with pytest.raises(ValueError, match="must hold fewer_steps"):
        fewer_steps(tmp_path / "none")


def test_one_seed_agrees_with_nothing():
    assert agreement([{"task": "open", "subject": "0", "kind": "dots"}], ["kind"]) is None
