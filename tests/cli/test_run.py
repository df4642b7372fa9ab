"""`sra run` makes the picture that the same call in Python makes, once, and says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.cli import calling, main
from sparse_ref_attn.cli.recorded import record_of
from sparse_ref_attn.eval import loading
from sparse_ref_attn.eval.sizes import size_of
from tests.cli.commands import KLEIN, KONTEXT, pixels, run
from tests.pictures import picture
from tests.pipelines import CASES

GRID = ["--preset", "sparse-context", "--rule", "grid"]


def steps_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of each call of a pipeline from here on."""
    real, asked = calling.caller, list[int]()

    def caller(*arguments: Any) -> Any:
        call = real(*arguments)
        return lambda steps: asked.append(steps) or call(steps)

    monkeypatch.setattr(calling, "caller", caller)
    return asked


def python_call(steps: int = 3, seed: int = 5, **more: Any) -> tuple[Any, dict[str, Any]]:
    pipe = CASES["kontext"].build()
    return pipe, {
        "prompt": "a cat", "height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False,
        "max_sequence_length": 32, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed),
    } | more  # fmt: skip


def test_the_picture_is_that_of_the_python_call_and_runs_once(
    models: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = steps_asked(monkeypatch)
    text = run(
        "run", photo, "-p", "a cat", "-o", tmp_path / "out.png", "--model", models / "kontext", "--steps", "3",
        "--keep", "24", "--seed", "5", *GRID, *KONTEXT,
    )  # fmt: skip
    assert asked == [3]  # no warm-up, no dense run
    pipe, arguments = python_call(image=PIL.Image.open(photo))
    with sra.patched(pipe, sra.SparseContext(24, "grid")):
        sparse = pipe(**arguments).images[0]
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(sparse))
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert text.startswith(f"{tmp_path / 'out.png'}: 32 x 32, seed 5, 3 steps, 4.69 % of 512 reference tokens, ")


def test_compare_dense_makes_the_other_beside_it(models: Path, photo: Path, tmp_path: Path) -> None:
    text = run(
        "run", photo, "-p", "a cat", "-o", tmp_path / "out.png", "--model", models / "kontext", "--steps", "2",
        "--keep", "24", "--seed", "5", "--compare-dense", "--json", *GRID, *KONTEXT,
    )  # fmt: skip
    pipe, arguments = python_call(2, image=PIL.Image.open(photo))
    dense = np.asarray(pipe(**arguments).images[0])
    assert np.array_equal(pixels(tmp_path / "out-dense.png"), dense)
    assert not np.array_equal(pixels(tmp_path / "out.png"), dense)
    found = json.loads(text)
    assert found["dense"]["picture"] == str(tmp_path / "out-dense.png")
    assert found["dense"]["speedup"] == pytest.approx(found["dense"]["seconds"] / found["seconds"])
    assert record_of(tmp_path / "out-dense.png")["config"] is None
    assert record_of(tmp_path / "out.png")["config"] == json.loads(sra.SparseContext(24, "grid").to_json())


def test_json_is_alone_on_stdout_and_the_file_says_the_same(
    models: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(64, 64, 4).save(tmp_path / "second.png")
    command = [
        "run", photo, "-p", "a café", tmp_path / "second.png", "-o", tmp_path / "o" / "out.png", "--json", "--model",
        models / "klein", "--height", "64", "--width", "64", "--steps", "2", "--task", "subject", "--guidance", "2",
        *KLEIN[:4],
    ]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "Loaded Flux2KleinPipeline" in said.err
    assert found["status"] == "made"
    assert found["images"] == [str(photo), str(tmp_path / "second.png")]
    assert found["size"] == [64, 64]
    assert (found["prompt"], found["guidance"], found["negative"], found["dense"]) == ("a café", 2.0, None, None)
    assert found["reference_tokens"]["all"] == 8 * 16 + 8 * 8
    assert found["flop_ratio"] > 1
    record = record_of(tmp_path / "o" / "out.png")
    assert record == {name: record.get(name, value) for name, value in found.items() if name in record}
    assert set(found) - set(record) == {"status", "picture", "dense"}
    assert record["images"] == ["photo.png", "second.png"]  # no paths of this machine
    assert record["model"] == "klein"


def test_quiet_says_nothing(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    see_through = picture(32, 32).convert("RGBA")
    see_through.putalpha(100)
    see_through.save(tmp_path / "alpha.png")
    command = ["run", tmp_path / "alpha.png", "-p", "x", "-o", tmp_path / "out.png", "--model", models / "kontext"]
    command += ["--steps", "2", "--quiet", *KONTEXT]
    assert main([str(word) for word in command]) == 0
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert [line for line in caplog.messages if "put on white" in line] == []
    assert pixels(tmp_path / "out.png").shape == (32, 32, 3)


def test_the_reference_cache_is_read_as_it_is_told(models: Path, photo: Path, tmp_path: Path) -> None:
    """Every flag of the cache, and the picture of the same settings in Python."""
    text = run(
        "run", photo, "-p", "a cat", "--out", tmp_path / "out.png", "--model", models / "klein_kv", "--steps", "3",
        *GRID, "--keep", "50%", "--execute", "both", "--layers", "1,0.5,1,1", "--cache-rows", "all", "--json",
        *KLEIN[:4],
    )  # fmt: skip
    config = sra.SparseContext(0.5, "grid", execute="both", layers=(1.0, 0.5, 1.0, 1.0), cache_rows="all")
    assert json.loads(text)["config"] == json.loads(config.to_json())
    pipe = CASES["klein_kv"].build()
    with sra.patched(pipe, config):
        image = pipe(
            prompt="a cat", image=PIL.Image.open(photo), num_inference_steps=3, max_sequence_length=48,
            text_encoder_out_layers=(1, 2, 3), generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
    difference = pixels(tmp_path / "out.png").astype(int) - np.asarray(image)
    assert abs(difference).max() <= 1  # weights read from a file lie elsewhere in memory, and round otherwise


def test_a_negative_prompt_and_several_pictures_from_seeds_that_follow(
    models: Path, photo: Path, tmp_path: Path
) -> None:
    common = ["run", photo, "-p", "a cat", "--model", models / "kontext", "--steps", "2", *GRID, *KONTEXT]
    negative = ["--negative", "a dog", "--set", "true_cfg_scale=3"]
    run(*common, *negative, "-o", tmp_path / "a.png", "--num-images", "2", "--seed", "5")
    run(*common, *negative, "-o", tmp_path / "b.png", "--seed", "6")
    run(*common, "-o", tmp_path / "c.png", "--seed", "6")
    assert {path.name for path in tmp_path.iterdir()} == {"a-1.png", "a-2.png", "b.png", "c.png"}
    assert np.array_equal(pixels(tmp_path / "a-2.png"), pixels(tmp_path / "b.png"))
    assert not np.array_equal(pixels(tmp_path / "a-1.png"), pixels(tmp_path / "b.png"))
    assert not np.array_equal(pixels(tmp_path / "c.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(("side", "size"), [("--width", [96, 48]), ("--height", [192, 96])])
def test_one_side_keeps_the_shape_of_the_reference(
    side: str, size: list[int], models: Path, photo: Path, tmp_path: Path
) -> None:
    text = run(
        "run", photo, "-p", "x", "-o", tmp_path / "out.png", "--model", models / "kontext", "--steps", "1", side, "96",
        "--json", *GRID, *KONTEXT[:4],
    )  # fmt: skip
    assert json.loads(text)["size"] == size
    assert pixels(tmp_path / "out.png").shape == (*size[::-1], 3)


def test_without_a_size_every_pipeline_keeps_the_shape_of_the_reference() -> None:
    """FLUX.1 Kontext alone would make a square of it; Qwen-Image-Edit-Plus takes the last reference's shape."""
    wide, tall = picture(300, 200), picture(200, 400)

    def size(name: str, *images: PIL.Image.Image, **sides: int) -> Any:
        return size_of(CASES[name].build(), images, sides.get("width"), sides.get("height"), {})

    assert size("kontext", wide) == (836, 1252)  # a megapixel of 3 : 2, in tokens of 4
    assert size_of(CASES["kontext"].build(), [wide], None, None, {"max_area": 100}) is None
    assert size("klein", wide) is size("qwen_edit", wide) is None
    assert size("klein", wide, tall, width=96) == (64, 96)
    assert size("qwen_edit_plus", wide, tall, width=96) == (192, 96)
    assert size("klein", wide, height=64, width=640) == (64, 640)


def test_a_reference_stands_upright_before_its_shape_is_taken(models: Path, tmp_path: Path) -> None:
    turned = picture(128, 64)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    command = ["run", tmp_path / "turned.jpg", "-p", "x", "-o", tmp_path / "out.png", "--model", models / "kontext"]
    run(*command, "--steps", "1", "--width", "32", *GRID, *KONTEXT[:4])
    assert pixels(tmp_path / "out.png").shape == (64, 32, 3)


def test_without_a_model_it_is_the_small_one_and_says_so_in_one_line(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(photo), "-p", "swap rows red to-blue", "-o", f"{tmp_path}/", "--steps", "2"]) == 0
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if line.startswith("No --model, so this is the small model")]
    assert said.out.startswith(f"{tmp_path}/photo.png: 128 x 128")
    first = pixels(tmp_path / "photo.png")
    run("run", "--image", photo, "-p", "swap rows red to-green", "-o", tmp_path, "--steps", "2", "--quiet")
    assert not np.array_equal(pixels(tmp_path / "photo.png"), first)  # a picture of its own is replaced


def test_each_picture_has_a_patch_of_its_own_that_is_gone_after_it(
    models: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    real = loading.load_pipeline
    monkeypatch.setattr(loading, "load_pipeline", lambda *a, **k: kept.append(real(*a, **k)) or kept[0])
    command = ["run", photo, "-p", "x", "-o", tmp_path / "a.png", "--model", models / "kontext", "--steps", "1"]
    run(*command, "--num-images", "2", *GRID, *KONTEXT)
    ((pipe, _),) = kept
    assert not pipe.transformer._forward_pre_hooks
    assert not pipe.transformer._forward_hooks
