"""A folder or a JSON-lines file of edits: one model, nothing twice, and a killed run leaves nothing by half."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from sparse_ref_attn.cli import calling, main
from sparse_ref_attn.cli.recorded import record_of
from sparse_ref_attn.eval import loading
from tests import programs
from tests.cli.commands import KONTEXT, pixels, run
from tests.disk import largest_file
from tests.pictures import picture

FAST = ["--steps", "1", "--preset", "sparse-context", "--rule", "grid", *KONTEXT]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures and a text."""
    made = tmp_path / "photos"
    made.mkdir()
    for i in range(3):
        picture(48, 32, i).save(made / f"p{i}.png")
    (made / "notes.txt").write_text("no picture")
    return made


def lines(path: Path, *edits: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(edit) for edit in edits))
    return path


def results(*command: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run("run", "--json", *command).splitlines()]


def test_a_folder_is_edited_with_one_model_and_what_is_there_is_not_made_again(
    folder: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, real = [], loading.load_pipeline
    monkeypatch.setattr(loading, "load_pipeline", lambda *a, **k: loads.append(a) or real(*a, **k))
    out = tmp_path / "out"
    command = (folder, "-p", "a cat", "-o", out, "--model", models / "kontext", *FAST)
    assert [(r["status"], r["picture"]) for r in results(*command)] == [
        ("made", str(out / f"p{i}.png")) for i in range(3)
    ]
    assert len(loads) == 1
    (out / "p1.png").unlink()
    before = (out / "p0.png").stat().st_mtime_ns
    again = results(*command)
    assert sorted((r["status"], Path(r["picture"]).name) for r in again) == [
        ("made", "p1.png"), ("there", "p0.png"), ("there", "p2.png"),
    ]  # fmt: skip
    assert (out / "p0.png").stat().st_mtime_ns == before
    assert set(again[0]) == set(again[-1])
    assert [r["status"] for r in results(*command)] == ["there"] * 3
    assert len(loads) == 2  # nothing is left to make: no model
    run("run", folder / "p1.png", "-p", "a cat", "-o", tmp_path / "alone.png", "--model", models / "kontext", *FAST)
    assert np.array_equal(pixels(tmp_path / "alone.png"), pixels(out / "p1.png"))


def test_other_settings_or_another_reference_are_another_picture(folder: Path, models: Path, tmp_path: Path) -> None:
    def made(*more: str) -> int:
        found = results(folder, "-p", "a", "-o", tmp_path / "out", "--model", models / "kontext", *FAST, *more)
        return [result["status"] for result in found].count("made")

    (folder / "p2.png").unlink()
    assert made() == 2
    assert made("--offload", "none", "--device", "cpu") == 0
    assert made("--seed", "1") == 2
    assert made("--seed", "1", "--keep", "50%") == 2
    picture(48, 32, 9).save(folder / "p0.png")
    assert made("--seed", "1", "--keep", "50%") == 1
    assert made("--seed", "1", "--keep", "50%", "--compare-dense") == 2
    assert made("--seed", "1", "--keep", "50%", "--compare-dense") == 0


def test_a_line_says_what_the_command_does_not(folder: Path, models: Path, tmp_path: Path) -> None:
    index = lines(
        folder / "edits.jsonl",
        {"image": "p0.png"},
        {"image": ["p1.png"], "prompt": "a dog", "out": "sub/dog.jpg", "seed": 7, "steps": 2, "height": 48},
        {"image": "p2.png", "num_images": 2, "guidance": 1.5},
    )
    out = tmp_path / "out"
    found = results(index, "-p", "a cat", "-o", out, "--model", models / "kontext", *FAST)
    names = ["0001-p0.png", "sub/dog.jpg", "0003-p2-1.png", "0003-p2-2.png"]
    assert [r["picture"] for r in found] == [str(out / name) for name in names]
    assert [(r["prompt"], r["seed"], r["steps"], r["size"], r["guidance"]) for r in found] == [
        ("a cat", 0, 1, [32, 32], None), ("a dog", 7, 2, [32, 48], None), ("a cat", 0, 1, [32, 32], 1.5),
        ("a cat", 1, 1, [32, 32], 1.5),
    ]  # fmt: skip
    assert all((out / name).is_file() for name in names)


def test_one_that_fails_does_not_end_the_others(
    folder: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "p1.png").read_bytes()
    (folder / "p1.png").write_bytes(whole[: len(whole) - 100])
    command = ["run", folder, "-p", "a", "-o", tmp_path / "out", "--model", models / "kontext", "--json", *FAST]
    assert main([str(word) for word in command]) == 2
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [r["status"] for r in found] == ["made", "failed", "made"]
    assert found[1]["code"] == 2
    assert "p1.png" in found[1]["error"]
    assert said.err.splitlines()[-1] == "sra: error: 1 of 3 pictures could not be made, as told above"
    (folder / "p1.png").write_bytes(whole)
    assert [r["status"] for r in results(*command[1:])].count("made") == 1


def test_memory_that_runs_out_at_one_is_told_with_its_code(
    folder: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, count = calling.caller, iter(range(9))

    def caller(*arguments: Any) -> Any:
        call, number = real(*arguments), next(count)

        def limited(steps: int) -> Any:
            if number == 1:
                raise MemoryError
            return call(steps)

        return limited

    monkeypatch.setattr(calling, "caller", caller)
    command = ["run", folder, "-p", "a", "-o", tmp_path / "out", "--model", models / "kontext", *FAST]
    assert main([str(word) for word in command]) == 3
    said = capsys.readouterr().err
    assert "p1.png: memory must hold the run, got: MemoryError" in said
    assert "--quantize int8 halves the transformer's weights" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"p0.png", "p2.png"}


def test_a_full_disk_ends_it_and_leaves_no_half_picture(
    folder: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To go on would compute every picture for nothing."""
    command = ["run", folder, "-p", "a", "-o", tmp_path / "out", "--model", models / "kontext", *FAST]
    with largest_file(1000):
        assert main([str(word) for word in command]) == 2
    said = capsys.readouterr().err
    assert "Made 0 of 3 pictures before it ended." in said
    assert said.splitlines()[-1].startswith("sra: error: p0.png must fit into ")
    assert list((tmp_path / "out").iterdir()) == []


def run_in(arguments: list[str]) -> int:
    """What a process of its own does."""
    return main(arguments)


def test_a_killed_run_leaves_whole_pictures_and_goes_on(folder: Path, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    edits = [{"image": "p0.png", "seed": seed, "out": f"{seed:02d}.png"} for seed in range(20)]
    index = lines(folder / "edits.jsonl", *edits)
    command = [index, "-p", "a cat", "-o", out, "--model", models / "kontext", *FAST, "--steps", "2"]
    process = programs.start(run_in, ["run", *map(str, command)], log=tmp_path / "log")
    while process.is_alive() and len(list(out.glob("*.png"))) < 3:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert 3 <= len(left) < 20, (tmp_path / "log").read_text()
    for name in left:
        with PIL.Image.open(out / name) as image:
            image.load()  # a half picture raises
        assert record_of(out / name) is not None
    again = results(*command)
    assert {Path(r["picture"]).name for r in again if r["status"] == "there"} == set(left)
    assert len(again) == 20
    assert all((out / name).read_bytes() == content for name, content in left.items())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"image": "p0.png", "step": 2}, "edit 1: must have the fields image, prompt, negative, out, guidance, steps"),
        ({"image": "p0.png", "steps": 0}, "edit 1: steps must be a whole number of at least 1, got '0'"),
        ({"image": "p0.png", "steps": 2.5}, "edit 1: steps must be a whole number of at least 1, got '2.5'"),
        ({"image": "p0.png", "seed": True}, "edit 1: seed must be a whole number in [0, 2**64), got 'true'"),
        ({"image": "p0.png", "guidance": "much"}, "edit 1: guidance must be a number of at least 0"),
        ({"image": "p0.png", "prompt": 3}, "edit 1: prompt must be a text, got 3"),
        ({"image": "p0.png", "out": "../a.png"}, "edit 1: out must be a name below the output folder, got ../a.png"),
        ({"image": "p0.png", "out": "a.gif"}, "the output must end in .png, .jpg, .jpeg, got"),
        ({"image": "p9.png"}, "p9.png, which does not exist"),
        ({"image": []}, "edit 1: image must be a path or a list of paths, got []"),
        ({"prompt": "x"}, "edit 1: image must be a path or a list of paths, got null"),
        ({"image": ["p0.png", "p1.png"]}, "FluxKontextPipeline takes one reference image, got 2"),
        ({"image": "p0.png", "width": 30}, "height and width must be multiples of 4 pixels, got 32 x 30"),
        ({"image": "p0.png", "negative": "y"}, "must come with true_cfg_scale set above 1 (--set), or it does nothing"),
    ],
)
def test_a_wrong_line_is_told_before_the_model_is_loaded(
    edit: dict[str, Any], words: str, folder: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(loading, "load_pipeline", None)
    index = lines(folder / "edits.jsonl", edit)
    command = ["run", index, "-p", "a", "-o", tmp_path / "out", "--model", models / "kontext", *FAST]
    assert main([str(word) for word in command]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("sra: error: "))
    assert words in line
    assert not (tmp_path / "out").exists()
