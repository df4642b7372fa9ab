"""The command line on tiny pipelines: files, tables, numbers that agree, and one clear line for every mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn import doctor
from sparse_ref_attn.adapters.base import adapter_for
from sparse_ref_attn.adapters.geometries import named_model
from sparse_ref_attn.cli import execution, main
from sparse_ref_attn.eval.clock import time_call
from sparse_ref_attn.eval.compare import compare
from sparse_ref_attn.eval.embedded import SIZES, kontext_pipeline
from sparse_ref_attn.eval.loading import call_arguments, open_image
from sparse_ref_attn.ops.gather_attention.api import BACKENDS
from tests.pictures import picture
from tests.pipelines import CASES

TINY = ["demo", "--size", "tiny", "--steps", "2"]
KONTEXT = ["--set", "max_sequence_length=32", "--set", "_auto_resize=false", "--height", "32", "--width", "32"]
KLEIN = ["--set", "max_sequence_length=48", "--set", "text_encoder_out_layers=[1, 2, 3]", "--set", "guidance_scale=1"]


def run(*arguments: object) -> str:
    """Run a command that must succeed; what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(a) for a in arguments]) == 0
    return out.getvalue()


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).copy()


def report(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("demo")
    return directory, run(*TINY, "--out", directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name in ("kontext", "kontext_inpaint", "klein", "klein_kv"):
        CASES[name].build().save_pretrained(directory / name)
    return directory


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    picture(128, 64, 3).save(path)
    return path


# -- demo ------------------------------------------------------------------------------------


def test_demo_writes_what_it_says(demo: tuple[Path, str]) -> None:
    directory, text = demo
    assert {p.name for p in directory.iterdir()} == {"dense.png", "sparse.png", "kept.png", "report.json"}
    assert all(name in text for name in ("dense.png", "sparse.png", "kept.png", "report.json", str(directory)))
    assert pixels(directory / "dense.png").shape == pixels(directory / "sparse.png").shape == (32, 32, 3)
    assert pixels(directory / "kept.png").shape[1] == 1400


def test_demo_says_that_the_weights_are_random(demo: tuple[Path, str]) -> None:
    directory, text = demo
    assert "weights are random" in text
    assert "mean nothing" in text
    assert "random" in report(directory)["weights"]


def test_demo_table_shows_the_report(demo: tuple[Path, str]) -> None:
    directory, text = demo
    found = report(directory)["comparison"]
    rows = {line[:27].strip(): line for line in text.splitlines()}
    assert f"{found['speedup']:.2f}x" in rows["whole call"]
    assert f"{found['flop_ratio']:.2f}x (FLOP ratio)" in rows["transformer work, TFLOP"]
    assert f"{found['bound_speedup']:.2f}x" in rows["the bound of the whole call"]
    assert "25 % kept" in rows["reference tokens a step"]
    assert f"Measured over bound: {found['measured_over_bound']:.2f}" in text


def test_demo_numbers_agree(demo: tuple[Path, str]) -> None:
    found = report(demo[0])
    compared, (reference,) = found["comparison"], found["run"]["references"]
    dense, sparse, flops = compared["dense"], compared["sparse"], compared["flops"]
    assert (reference["tokens"], reference["kept_min"], reference["kept_max"]) == (64, 16, 16)
    assert found["run"]["reference_tokens"]["share"] == 0.25
    assert found["run"]["steps"]["ran"] == found["arguments"]["steps"] == 2
    assert 0 < dense["attention_seconds"] < dense["transformer_seconds"] < dense["seconds"]
    assert compared["flop_ratio"] == sum(flops["dense"].values()) / sum(flops["sparse"].values()) > 1
    assert compared["speedup"] == pytest.approx(dense["seconds"] / sparse["seconds"])
    joint, short = 32 + 64 + 64, 32 + 64 + 16  # text, generation, reference
    assert flops["dense"]["attention"] / flops["sparse"]["attention"] == pytest.approx((joint / short) ** 2)
    bound = (
        dense["attention_seconds"] * flops["sparse"]["attention"] / flops["dense"]["attention"]
        + (dense["transformer_seconds"] - dense["attention_seconds"])
        * flops["sparse"]["matmul"] / flops["dense"]["matmul"]
        + dense["seconds"] - dense["transformer_seconds"]
    )  # fmt: skip
    assert compared["bound_seconds"] == pytest.approx(bound)
    assert compared["measured_over_bound"] == pytest.approx(bound / sparse["seconds"])


def embedded_call(pipe: Any, image: PIL.Image.Image, steps: int = 2) -> PIL.Image.Image:
    return pipe(
        prompt="the same cup on a marble table", image=image.resize((32, 32)), height=32, width=32, max_area=32 * 32,
        _auto_resize=False, max_sequence_length=SIZES["tiny"].text, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip


def bundled_photo() -> PIL.Image.Image:
    return PIL.Image.open(Path(sra.__file__).parent / "assets" / "photo.jpg").convert("RGB")


def test_dense_picture_is_that_of_a_pipeline_never_patched(demo: tuple[Path, str]) -> None:
    alone = np.asarray(embedded_call(kontext_pipeline("tiny"), bundled_photo()))
    assert np.array_equal(pixels(demo[0] / "dense.png"), alone)
    assert not np.array_equal(pixels(demo[0] / "sparse.png"), alone)


def test_demo_repeats_for_a_seed(demo: tuple[Path, str], tmp_path: Path) -> None:
    run(*TINY, "--out", tmp_path / "same")
    run(*TINY, "--out", tmp_path / "other", "--seed", "1")
    for name in ("dense.png", "sparse.png"):
        assert np.array_equal(pixels(tmp_path / "same" / name), pixels(demo[0] / name))
        assert not np.array_equal(pixels(tmp_path / "other" / name), pixels(demo[0] / name))


def test_demo_takes_a_photo_of_any_shape(tmp_path: Path, photo: Path) -> None:
    run(*TINY, "--out", tmp_path, "--image", photo, "--keep", "50%")
    assert pixels(tmp_path / "dense.png").shape == (24, 44, 3)  # 2 : 1 at an area of about 32 x 32, in tokens of 4
    (reference,) = report(tmp_path)["run"]["references"]
    assert reference["grid"] == [6, 11]
    assert reference["kept_mean"] == 33


def test_a_picture_of_too_many_pixels(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(sra.ConfigError, match=r"an image must be a readable file, got .* exceeds limit"):
        open_image(photo)


def test_demo_recast_profiles_and_then_drops(tmp_path: Path) -> None:
    text = run(*TINY, "--out", tmp_path, "--preset", "recast", "--keep", "0.5", "--steps", "3")
    by_step = report(tmp_path)["run"]["by_step"]
    assert by_step["kind"] == ["profile", "sparse", "sparse"]
    assert by_step["kept"] == [64, 14, 32]  # 1/8 + 3/8 (1/2)^2 of 64, and 1/2
    assert 'task="subject"' in text


def test_demo_small_is_the_trained_model_on_subjects_that_it_never_saw(tmp_path: Path, photo: Path) -> None:
    text = run("demo", "--out", tmp_path / "own", "--steps", "3", "--task", "swap", "--seed", "2", "--image", photo)
    names = ("references", "answer", "dense", "sparse", "kept")
    pictures = {name: pixels(tmp_path / "own" / f"{name}.png") for name in names}
    assert all(pictures[name].shape == (128, 128, 3) for name in names[:4])
    assert "the subjects of this call were held out" in text
    found = report(tmp_path / "own")
    assert found["prompt"].startswith("swap ")
    assert found["run"]["by_step"]["kind"] == ["profile", "sparse", "sparse"]
    assert found["run"]["by_step"]["kept"] == [256, 64, 64]
    row = [pictures[name] for name in names[:4]]
    assert np.array_equal(pixels(tmp_path / "own" / "row.png"), np.concatenate(row, 1))
    error = (pictures["dense"].astype(float) - pictures["answer"].astype(float)) / 255
    psnr = found["psnr_db"]["dense against the answer, whole picture"]
    assert psnr == pytest.approx(-10 * np.log10(np.square(error).mean()))
    assert f"dense against the answer, whole picture: {psnr:.1f} dB" in text
    run("demo", "--out", tmp_path / "bundled", "--steps", "3", "--task", "swap", "--seed", "2")
    same = pixels(tmp_path / "bundled" / "references.png") == pictures["references"]
    assert 0.05 < same.all(-1).mean() < 0.6  # the subject is the same, what it stands on is another photo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a cup"], "--prompt must come with --size large or tiny"),
        (["--size", "tiny", "--task", "place"], "--task must come with --size small, got --size tiny"),
        (["--task", "colour"], "invalid choice: 'colour'"),
    ],
)
def test_demo_arguments_of_the_other_model(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "none"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# -- run -------------------------------------------------------------------------------------


def test_run_kontext_equals_the_python_call(models: Path, photo: Path, tmp_path: Path) -> None:
    run(
        "run", "--model", models / "kontext", "--image", photo, "--prompt", "a cat", "--out", tmp_path, "--steps", "3",
        "--preset", "sparse-context", "--select", "grid", "--keep", "24", "--seed", "5", *KONTEXT,
    )  # fmt: skip
    pipe = CASES["kontext"].build()
    arguments = {
        "prompt": "a cat", "image": PIL.Image.open(photo), "height": 32, "width": 32, "max_area": 32 * 32,
        "_auto_resize": False, "max_sequence_length": 32, "num_inference_steps": 3,
    }  # fmt: skip
    dense = pipe(**arguments, generator=torch.Generator().manual_seed(5)).images[0]
    with sra.patched(pipe, sra.SparseContext(24, "grid")):
        sparse = pipe(**arguments, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.array_equal(pixels(tmp_path / "dense.png"), np.asarray(dense))
    assert np.array_equal(pixels(tmp_path / "sparse.png"), np.asarray(sparse))
    assert not np.array_equal(np.asarray(dense), np.asarray(sparse))
    found = report(tmp_path)
    assert found["run"]["references"][0]["kept_mean"] == 24
    assert found["pipeline"] == "FluxKontextPipeline"
    assert found["images"] == [str(photo)]


def test_run_klein_with_two_references_and_no_dense_run(models: Path, photo: Path, tmp_path: Path) -> None:
    picture(64, 64, 4).save(tmp_path / "second.png")
    text = run(
        "run", "--model", models / "klein", "--image", photo, "--image", tmp_path / "second.png", "--prompt", "a cat",
        "--out", tmp_path / "out", "--height", "64", "--width", "64", "--steps", "2", "--no-compare-dense",
        "--task", "subject", *KLEIN,
    )  # fmt: skip
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"sparse.png", "kept.png", "report.json"}
    found = report(tmp_path / "out")
    assert (
        found["comparison"]["dense"] is found["comparison"]["speedup"] is found["comparison"]["bound_seconds"] is None
    )
    assert found["comparison"]["flop_ratio"] > 1
    assert [r["grid"] for r in found["run"]["references"]] == [[8, 16], [8, 8]]
    assert found["run"]["by_step"]["kind"] == ["profile", "sparse"]
    assert "whole call" in text


def test_run_reads_the_reference_cache_as_it_is_told(models: Path, photo: Path, tmp_path: Path) -> None:
    """Every flag of the cache, and the picture of the same settings in Python."""
    run(
        "run", "--model", models / "klein_kv", "--image", photo, "--prompt", "a cat", "--out", tmp_path, "--steps", "3",
        "--preset", "sparse-context", "--select", "grid", "--keep", "50%", "--execute", "both", "--layers", "1,0.5,1,1",
        "--cache-rows", "all", "--set", "max_sequence_length=48", "--set", "text_encoder_out_layers=[1, 2, 3]",
    )  # fmt: skip
    found = report(tmp_path)["run"]
    config = sra.SparseContext(0.5, "grid", execute="both", layers=(1.0, 0.5, 1.0, 1.0), cache_rows="all")
    assert found["config"] == json.loads(config.to_json())
    assert found["by_step"]["kind"] == ["sparse", "cached", "cached"]
    pipe = CASES["klein_kv"].build()
    with sra.patched(pipe, config):
        image = pipe(
            prompt="a cat", image=PIL.Image.open(photo), num_inference_steps=3, max_sequence_length=48,
            text_encoder_out_layers=(1, 2, 3), generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
    difference = pixels(tmp_path / "sparse.png").astype(int) - np.asarray(image)
    assert (
        abs(difference).max() <= 1
    )  # weights read from a file lie elsewhere in memory, and round otherwise, dense too


@pytest.mark.parametrize(
    ("flags", "kinds", "config"),
    [
        (["--from-block", "1"], ["sparse"] * 4, {"from_block": 1}),
        (
            ["--preset", "recast", "--profile", "in_flight", "--profile-blocks", "2"],
            ["in_flight", *["sparse"] * 3],
            {"profile": "in_flight", "profile_blocks": 2},
        ),
        (
            ["--preset", "recast", "--rerank-every", "2"],
            ["profile", "sparse", "profile", "sparse"],
            {"rerank_every": 2},
        ),
        ([], ["sparse"] * 4, {}),
    ],
)
def test_demo_takes_its_execution_from_the_flags(
    flags: list[str], kinds: list[str], config: dict[str, Any], tmp_path: Path
) -> None:
    run("demo", "--size", "tiny", "--steps", "4", "--keep", "0.5", "--out", tmp_path, *flags)
    found = report(tmp_path)["run"]
    assert found["by_step"]["kind"] == kinds
    default = json.loads(sra.SparseRef().to_json())
    fields = ("execute", "from_block", "profile", "profile_blocks", "layers", "cache_rows", "rerank_every")
    assert {name: found["config"][name] for name in fields} == {name: default[name] for name in fields} | config


def test_the_flags_are_those_of_the_configuration_and_the_same_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for command in ("demo", "run", "compare", "estimate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told.append(capsys.readouterr().out.partition("\nexecution:\n")[2].partition("\n\n")[2])
    assert len(set(told)) == 1
    flags = {flag.lstrip("-").replace("-", "_") for flag in re.findall(r"^  (--[a-z-]+)", told[0], re.MULTILINE)}
    assert flags == set(execution.FIELDS) <= {field.name for field in dataclasses.fields(sra.SparseRef)}


def test_several_images_are_one_list_where_the_pipeline_takes_one(photo: Path) -> None:
    images = [picture(), picture(seed=1)]
    arguments = call_arguments(CASES["qwen_edit_plus"].build(), images, "a cat", more={"true_cfg_scale": 1.0})
    assert arguments["image"] == images
    assert arguments["num_inference_steps"] == 50
    with pytest.raises(sra.ConfigError, match="takes one reference image, got 2"):
        call_arguments(CASES["qwen_edit"].build(), images, "a cat")


# -- mistakes --------------------------------------------------------------------------------

RUN = ["run", "--model", "{models}/kontext", "--prompt", "x", "--out", "{out}", "--image", "{photo}"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TINY, "--out", "{out}", "--image", "{out}/none.png"], "does not exist"),
        ([*TINY, "--out", "{out}", "--image", "{text}"], "format that Pillow reads"),
        ([*TINY, "--out", "{out}", "--keep", "0"], "keep must be a number of tokens"),
        ([*TINY, "--out", "{out}", "--keep", "1.5"], "keep must be a number of tokens"),
        ([*TINY, "--out", "{out}", "--keep", "65"], "65"),
        ([*TINY, "--out", "{out}", "--keep", "most"], "must be a share"),
        ([*TINY, "--out", "{out}", "--keep", "1"], "write 100% for all"),
        ([*TINY, "--out", "{out}", "--preset", "recast", "--keep", "0.0"], "must lie in (0, 1]"),
        ([*TINY, "--out", "{out}", "--preset", "recast", "--keep", "nan"], "must lie in (0, 1]"),
        ([*TINY, "--out", "{out}", "--preset", "recast", "--keep", "9"], "must be a share"),
        ([*TINY, "--out", "{out}", "--preset", "best"], "'recast', 'sparse-context'"),
        ([*TINY, "--out", "{text}"], "must be a directory"),
        ([*TINY, "--out", "{text}/below"], "must be a directory"),
        ([*TINY, "--out", "{out}", "--steps", "0"], "at least 1"),
        ([*TINY], "--out"),
        ([], "COMMAND"),
        ([*RUN, "--image", "{photo}"], "takes one reference image, got 2"),
        ([*RUN, "--set", "strength=1"], "got strength"),
        ([*RUN, "--set", "strength"], "NAME=VALUE"),
        ([*RUN, "--height", "32"], "must be given together"),
        ([*RUN, "--device", "quantum"], "one that torch knows"),
        ([*RUN, "--device", "cpu", "--offload", "model"], "needs a CUDA device"),
        ([*RUN, "--model", "{out}"], "must hold model_index.json"),
        ([*RUN, "--model", "{models}/kontext_inpaint"], "got FluxKontextInpaintPipeline"),
        (
            [*RUN, "--model", "{models}/klein", "--image", "{small}", *KLEIN],
            "Flux2KleinPipeline refused the call: Image",
        ),
        ([*TINY, "--out", "{out}", "--execute", "kv"], "invalid choice: 'kv'"),
        ([*TINY, "--out", "{out}", "--execute", "cache"], 'Use execute="tokens"'),
        ([*TINY, "--out", "{out}", "--layers", "1,half"], "must be factors in (0, 1]"),
        ([*TINY, "--out", "{out}", "--layers", "1,0.5"], 'with execute="cache" or "both", got'),
        ([*TINY, "--out", "{out}", "--from-block", "-1"], "at least 0"),
        ([*TINY, "--out", "{out}", "--from-block", "3"], "from_block must lie below the model's 3 blocks, got 3"),
        ([*TINY, "--out", "{out}", "--profile", "in_flight"], "needs a selector (or a guard) that measures"),
        ([*TINY, "--out", "{out}", "--profile-blocks", "1"], 'with profile="in_flight" only'),
        ([*TINY, "--out", "{out}", "--rerank-every", "0"], "at least 1"),
        ([*RUN, "--cache-rows", "some"], "invalid choice: 'some'"),
        ([*RUN, "--execute", "both", *KONTEXT], "got FLUX.1 Kontext without such a cache"),
        (
            ["compare", "--out", "{out}/c", "--methods", "ToMe", "downscaled", "--execute", "cache"],
            "ToMe, downscaled: a rival that changes tokens",
        ),
        (["estimate", "--model", "kontext", "--execute", "cache"], "got FLUX.1 Kontext without such a cache"),
        (["estimate", "--model", "klein-9b", "--execute", "cache", "--layers", "1"], "each of the 32 attention layers"),
        (["estimate", "--model", "{out}"], "kontext, flux2-dev"),
        (["estimate", "--model", "kontext", "--size", "1024"], "WIDTHxHEIGHT"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, models: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "text").write_text("not an image")
    picture(32, 32).save(tmp_path / "small.png")
    places = {
        "small": tmp_path / "small.png",
        "out": tmp_path / "out",
        "text": tmp_path / "text",
        "models": models,
        "photo": photo,
    }
    assert main([argument.format(**places) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sra: error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
@pytest.mark.parametrize("arguments", [TINY, RUN[:-4] + RUN[-2:]])
def test_a_missing_package_is_named(
    package: str, arguments: list[str], tmp_path: Path, models: Path, photo: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    given = [argument.format(models=models, photo=photo) for argument in arguments]
    assert main([*given, "--out", str(tmp_path)]) == 2
    assert "pip install 'sparse-ref-attn[diffusers]'" in capsys.readouterr().err


# -- estimate, doctor ------------------------------------------------------------------------


def test_estimate_is_that_of_the_library(models: Path) -> None:
    command = ["estimate", "--references", "2", "--size", "512x768", "--steps", "4", "--preset", "sparse-context"]
    found = json.loads(run(*command, "--model", "klein-4b", "--keep", "25%", "--json"))
    same = sra.estimate(
        named_model("klein-4b"), references=[(512, 768)] * 2, steps=4, config=sra.SparseContext(0.25)
    ).to_dict()
    assert found == json.loads(json.dumps(same))
    assert "FLOP ratio" in run(*command, "--model", models / "klein")


def test_doctor_says_what_is_there_and_what_is_not() -> None:
    text, data = run("doctor"), json.loads(run("doctor", "--json"))
    assert f"torch            {torch.__version__}" in text
    assert "supported: >= 0.42, < 0.43" in text
    assert all(word in text for word in ("FluxTransformer2DModel", "Qwen-Image-Edit", "self-attention", "chunked"))
    assert data["versions"]["torch"] == torch.__version__
    assert {"sra demo", "sra run", "sra compare and eval", "sra train"} <= set(data["can"])
    for name, version in doctor.versions().items():
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        assert (version or "not installed") in line
    if not torch.cuda.is_available():
        assert "no CUDA device" in data["cannot"]["run on a GPU"]


def test_doctor_names_the_packages_that_a_command_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.versions()
    monkeypatch.setattr(doctor, "versions", lambda: {**found, "peft": None, "matplotlib": None, "scipy": None})
    cannot = doctor.diagnose()["cannot"]
    wanted = "matplotlib, scipy not installed: pip install 'sparse-ref-attn[eval]'"
    assert cannot["sra compare and eval"] == wanted
    assert cannot["sra train"] == "peft not installed: pip install 'sparse-ref-attn[train]'"
    monkeypatch.setattr(doctor, "versions", lambda: {**found, "diffusers": None})
    cannot = doctor.diagnose()["cannot"]
    assert all(why.startswith("diffusers not installed") for what, why in cannot.items() if what.startswith("sra"))


def test_doctor_names_the_backend_that_auto_takes_and_why_others_cannot() -> None:
    text, data = run("doctor"), json.loads(run("doctor", "--json"))
    assert set(data["backends"]) == {"gather_attention", "attention_mass", "pack_rows"}
    for op, found in data["backends"].items():
        section = text.partition(f"  {op}\n")[2]
        assert section.startswith(f"    {found['auto']:<14} yes, auto takes it\n")
        assert found["auto"] == found["can"][0]
        assert all(f"    {name:<14} no: {why}\n" in section for name, why in found["cannot"].items())
        assert "reference" in found["can"]
    gather = data["backends"]["gather_attention"]
    assert {"auto", *gather["can"], *gather["cannot"]} == set(BACKENDS)
    if not torch.cuda.is_available():
        assert [data["backends"][op]["auto"] for op in ("gather_attention", "attention_mass", "pack_rows")] == [
            "sdpa", "chunked", "reference",
        ]  # fmt: skip
        assert data["backends"]["gather_attention"]["cannot"]["flash"] == "needs a CUDA device, got cpu"
        assert all("NVIDIA" in why for why in data["flash_packages"].values())


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        done = subprocess.run([sys.executable, "-m", "sparse_ref_attn", "doctor"], stdout=out, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.decode()) == (1, "")


def test_the_command_line_needs_nothing_of_the_eval_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('scipy', 'skimage', 'matplotlib'): sys.modules[name] = None\n"
        "from sparse_ref_attn.cli import main\n"
        "assert main(['doctor']) == 0\n"
        "sys.exit(main(['compare', '--out', 'nowhere']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'sparse-ref-attn[diffusers,eval]'" in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"sparse_ref_attn {sra.__version__}"


# -- what they stand on ----------------------------------------------------------------------


def test_embedded_pipeline_is_seeded_and_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    pipe, same, other = kontext_pipeline("tiny"), kontext_pipeline("tiny"), kontext_pipeline("tiny", seed=1)
    assert torch.equal(torch.rand(3), expected)
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        first, second, third = (
            torch.nn.utils.parameters_to_vector(getattr(p, component).parameters()) for p in (pipe, same, other)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    with pytest.raises(sra.ConfigError, match="size must be one of 'large', 'tiny', got 'huge'"):
        kontext_pipeline("huge")


def test_embedded_picture_depends_on_the_reference() -> None:
    pipe = kontext_pipeline("tiny")
    a, b = (np.asarray(embedded_call(pipe, picture(32, 32, seed)), dtype=float) for seed in (0, 1))
    assert np.abs(a - b).mean() > 1  # of 255


def test_timing_a_call_leaves_nothing_behind() -> None:
    pipe, image = kontext_pipeline("tiny"), picture(32, 32)
    alone = embedded_call(pipe, image)
    transformer = pipe.transformer
    before = [vars(site.processor).copy() for site in adapter_for(transformer).sites(transformer)]
    timed, times = time_call(
        lambda: embedded_call(pipe, image), transformer, adapter_for(transformer).sites(transformer)
    )
    assert np.array_equal(np.asarray(timed), np.asarray(alone))
    assert 0 < (times.attention or 0) < times.transformer < times.whole
    assert times.fixed == pytest.approx(times.whole - times.transformer)
    assert [vars(site.processor) for site in adapter_for(transformer).sites(transformer)] == before
    assert not transformer._forward_hooks
    assert not transformer._forward_pre_hooks


def test_compare_takes_medians_of_interleaved_runs() -> None:
    pipe, image = kontext_pipeline("tiny"), picture(32, 32)
    pipe.set_progress_bar_config(disable=True)
    asked: list[int] = []

    def call(steps: int) -> PIL.Image.Image:
        asked.append(steps)
        return embedded_call(pipe, image, steps)

    result = compare(pipe, sra.SparseContext(0.25, "grid"), call, steps=3, repeats=3)
    assert asked == [1, 2] + [3] * 6
    assert len(result.dense_times) == len(result.sparse_times) == 3
    assert result.dense is not None
    assert result.dense.whole == sorted(t.whole for t in result.dense_times)[1]
    assert pipe._progress_bar_config == {"disable": True}
    with pytest.raises(sra.HandleRemovedError):
        result.handle.begin(1)
