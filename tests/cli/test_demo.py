"""`sra demo` on the tiny and the small model: files, tables and numbers that agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.eval.loading import open_image
from tests.cli.commands import TINY, embedded_call, pixels, report, run, sparse_run


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("demo")
    return directory, run(*TINY, "--out", directory)


def test_demo_writes_what_it_says(demo: tuple[Path, str]) -> None:
    directory, text = demo
    names = {p.name for p in directory.iterdir()} - {"fewer steps.png"}  # there where one step takes no longer
    assert names == {"dense.png", "sparse.png", "kept.png", "report.json"}
    assert all(name in text for name in ("dense.png", "sparse.png", "kept.png", "report.json", str(directory)))
    assert pixels(directory / "dense.png").shape == pixels(directory / "sparse.png").shape == (32, 32, 3)
    assert pixels(directory / "kept.png").shape[1] == 1400


def test_demo_says_that_the_weights_are_random(demo: tuple[Path, str]) -> None:
    directory, text = demo
    assert "weights are random" in text
    assert "mean nothing" in text
    assert "random" in report(directory)["about"]["note"]


def test_demo_table_shows_the_report(demo: tuple[Path, str]) -> None:
    directory, text = demo
    found = report(directory)["runs"]["sparse"]
    rows = {line[:27].strip(): line for line in text.splitlines()}
    assert f"{found['speedup']:.2f}x" in rows["whole call"]
    assert f"{found['flop_ratio']:.2f}x (FLOP ratio)" in rows["transformer work, TFLOP"]
    assert f"{found['bound_speedup']:.2f}x" in rows["the bound of the whole call"]
    assert "25 % kept" in rows["reference tokens a step"]
    assert f"Measured over bound: {found['measured_over_bound']:.2f}" in text


def test_demo_numbers_agree(demo: tuple[Path, str]) -> None:
    found = report(demo[0])
    compared, (reference,) = found["runs"]["sparse"], sparse_run(demo[0])["references"]
    dense, sparse, flops = compared["dense"], compared["sparse"], compared["flops"]
    assert (reference["tokens"], reference["kept_min"], reference["kept_max"]) == (64, 16, 16)
    assert compared["run"]["reference_tokens"]["share"] == 0.25
    assert compared["run"]["steps"]["ran"] == found["about"]["arguments"]["steps"] == 2
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
    (reference,) = sparse_run(tmp_path)["references"]
    assert reference["grid"] == [6, 11]
    assert reference["kept_mean"] == 33


def test_a_picture_of_too_many_pixels(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(sra.ConfigError, match=r"an image must be a readable file, got .* exceeds limit"):
        open_image(photo)


def test_demo_recast_profiles_and_then_drops(tmp_path: Path) -> None:
    text = run(*TINY, "--out", tmp_path, "--preset", "recast", "--keep", "0.5", "--steps", "3")
    by_step = sparse_run(tmp_path)["by_step"]
    assert by_step["kind"] == ["profile", "sparse", "sparse"]
    assert by_step["kept"] == [64, 10, 22]  # half of 64 on average, the last two by eq. (4) from 1/4 of its top
    assert sparse_run(tmp_path)["reference_tokens"]["share"] == 0.5
    assert 'task="subject"' in text


def test_demo_small_is_the_trained_model_on_subjects_that_it_never_saw(tmp_path: Path, photo: Path) -> None:
    text = run("demo", "--out", tmp_path / "own", "--steps", "3", "--edit", "swap", "--seed", "2", "--image", photo)
    names = ("references", "answer", "dense", "sparse", "kept")
    pictures = {name: pixels(tmp_path / "own" / f"{name}.png") for name in names}
    assert all(pictures[name].shape == (128, 128, 3) for name in names[:4])
    assert "the subjects of this call were held out" in text
    found = report(tmp_path / "own")
    assert found["about"]["arguments"]["prompt"].startswith("swap ")
    assert found["about"]["preset"] == "balanced"
    assert sparse_run(tmp_path / "own")["by_step"]["kind"] == ["dense", "cached", "dense"]
    row = pixels(tmp_path / "own" / "row.png").astype(float)
    for i, name in enumerate(names[:4]):  # each below its name, larger
        left = 24 + i * (320 + 24)
        column = row[:, left : left + 320]
        shown = PIL.Image.fromarray(pictures[name]).resize((320, 320), PIL.Image.Resampling.BICUBIC)
        assert any(np.array_equal(column[y : y + 320], np.asarray(shown)) for y in range(len(row) - 320)), name
    error = (pictures["dense"].astype(float) - pictures["answer"].astype(float)) / 255
    psnr = found["against_answer"]["dense against the answer, whole picture"]
    assert psnr == pytest.approx(-10 * np.log10(np.square(error).mean()))
    assert f"dense against the answer, whole picture: {psnr:.1f} dB" in text
    run("demo", "--out", tmp_path / "bundled", "--steps", "1", "--edit", "swap", "--seed", "2")
    same = pixels(tmp_path / "bundled" / "references.png") == pictures["references"]
    assert 0.05 < same.all(-1).mean() < 0.6  # the subject is the same, what it stands on is another photo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a cup"], "--prompt must come with --builtin large or tiny"),
        (["--size", "tiny", "--edit", "place"], "--edit must come with --builtin small, got --builtin tiny"),
        (["--edit", "colour"], "must be one of place, pair, swap, local, global, got 'colour'"),
    ],
)
def test_demo_arguments_of_the_other_model(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "none"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
