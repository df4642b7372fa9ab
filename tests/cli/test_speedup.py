"""`--speedup` takes the setting of the plan for it, and the presets are what the commands take by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.cli.recorded import record_of
from sparse_ref_attn.models import named_model
from tests.cli.commands import KONTEXT, TINY, pixels, report, run, sparse_run
from tests.cli.test_run import python_call

CALL = ["-p", "a cat", "--steps", "4", "--seed", "5", *KONTEXT]


def test_run_takes_the_default_and_says_so(models: Path, photo: Path, tmp_path: Path) -> None:
    text = run("run", photo, "-o", tmp_path / "out.png", "--model", models / "kontext", *CALL)
    pipe, arguments = python_call(4, image=PIL.Image.open(photo))
    with sra.patched(pipe):
        wanted = pipe(**arguments).images[0]
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(wanted))
    record = record_of(tmp_path / "out.png")
    assert record["preset"] == "balanced"
    assert f"{record['flop_ratio']:.2f}x less work, " in text


def test_run_plans_the_setting_for_a_speed(models: Path, photo: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "out.png", ["run", photo, "--model", models / "kontext", *CALL]
    found = json.loads(run(*command, "-o", out, "--speedup", "1.3x", "--json"))
    pipe, arguments = python_call(4, image=PIL.Image.open(photo))
    size = arguments["image"].width // 4 * 4, arguments["image"].height // 4 * 4
    planned = sra.plan(pipe, 1.3, references=[size], output=(32, 32), steps=4)
    assert found["preset"] is None
    assert found["config"] == json.loads(planned.config.to_json())
    with sra.patched(pipe, planned.config):
        assert np.array_equal(pixels(out), np.asarray(pipe(**arguments).images[0]))
    assert found["flop_ratio"] > 1.3
    again = json.loads(run(*command, "-o", tmp_path / "other.png", "--speedup", "1.2", "--json"))
    assert again["made_from"] != found["made_from"]


def test_a_speed_that_cannot_be_had_makes_no_picture(
    models: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", photo, "-o", tmp_path / "out.png", "--model", models / "kontext", *CALL, "--speedup", "50"]
    assert main([str(word) for word in command]) == 2
    assert "must be one that sparing references allows, got 50x where the fastest" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_estimate_prints_the_plan() -> None:
    command = ["estimate", "--model", "kontext", "--speedup", "1.7"]
    planned = sra.plan(named_model("kontext"), 1.7, steps=28)
    assert run(*command).strip() == planned.summary()
    assert json.loads(run(*command, "--json")) == json.loads(json.dumps(planned.to_dict()))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--speedup", "0.9"], "must be a number of at least 1, got '0.9'"),
        (["--speedup", "2", "--preset", "fast"], "chooses the setting and must stand alone, got --preset too"),
        (["--speedup", "2", "--refresh", "never"], "must stand alone, got --refresh too"),
        (["--preset", "fast", "--keep", "25%"], "keep must come with a preset that drops tokens (recast,"),
        (["--preset", "fast", "--rule", "edges"], "select='edges' must come with a preset that drops tokens"),
    ],
)
def test_what_contradicts_is_told(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--model", "kontext", *words]) == 2
    assert error in capsys.readouterr().err


def test_flags_that_say_which_tokens_are_kept_mean_recast() -> None:
    base = ["estimate", "--model", "klein-4b", "--json", "--steps", "8"]
    plain, kept, other = (json.loads(run(*base, *more)) for more in ([], ["--keep", "50%"], ["--refresh", "never"]))
    assert plain["kinds"].count("cached") == 6
    assert kept["kinds"] == ["profile", *["sparse"] * 7]
    assert other["kinds"].count("cached") == 7


def test_demo_with_random_weights_drops_tokens_unless_told(tmp_path: Path) -> None:
    run(*TINY, "--out", tmp_path, "--preset", "fast")
    assert sparse_run(tmp_path)["by_step"]["kind"] == ["dense", "cached"]
    assert report(tmp_path)["about"]["preset"] == "fast"
