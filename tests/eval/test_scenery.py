"""Scenery that is left open: how near it is to any right answer, and that no whole picture is compared with one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.examples import FAMILIES, procedural
from sparse_ref_attn.eval.metrics import SceneryContrast, SceneryPsnr
from sparse_ref_attn.eval.metrics.scenery import grown, nearest_texture
from sparse_ref_attn.eval.scores import Scorer
from sparse_ref_attn.toy.pipeline import toy_pipeline
from sparse_ref_attn.toy.textures import KINDS, Texture, random_texture
from sparse_ref_attn.vocabulary import OPEN_SCENERY
from tests.small_model import narrow_transformer

SIDE = 128
WHOLE = np.ones((SIDE, SIDE), np.float32)
NEAREST, CONTRAST = "scenery PSNR (dB) vs nearest", "scenery contrast"


@pytest.fixture(scope="module")
def textures() -> list[Texture]:
    """One of each kind."""
    many = [random_texture(np.random.default_rng((8, i)), SIDE) for i in range(40)]
    return [next(texture for texture in many if texture.kind == kind) for kind in KINDS]


def test_a_texture_is_found_again(textures: list[Texture]) -> None:
    """Its kind, its colours and its period, with half of it hidden."""
    hidden = np.zeros((SIDE, SIDE), bool)
    hidden[30:110, 20:116] = True
    for texture in textures:
        found = SceneryPsnr(hidden).nearest(texture.picture(SIDE))
        assert found.psnr > 45, texture
        assert found.texture.kind == texture.kind
        assert {found.texture.first, found.texture.second} == {texture.first, texture.second}
        assert found.texture.period == pytest.approx(texture.period, rel=0.005)
        again = -10 * np.log10(np.square(found.texture.picture(SIDE) - texture.picture(SIDE))[~hidden].mean())
        assert found.psnr == pytest.approx(again, abs=0.1)


def test_hidden_pixels_do_not_count(textures: list[Texture]) -> None:
    hidden = np.zeros((SIDE, SIDE), bool)
    hidden[40:80, 40:90] = True
    picture = textures[0].picture(SIDE)
    other = picture.copy()
    other[hidden] = 0.9
    measure = SceneryPsnr(hidden)
    assert measure(other) == measure(picture)
    assert SceneryPsnr(np.zeros_like(hidden))(other) < measure(picture) - 10


def test_what_was_drawn_is_told_from_what_was_not(textures: list[Texture]) -> None:
    """A texture of each kind through the autoencoder, as good as a model can draw it; a blur of each; two means."""
    vae = toy_pipeline(None).vae
    pictures = [texture.picture(SIDE) for texture in textures]
    with torch.no_grad():
        x = torch.from_numpy(np.stack(pictures)).movedim(-1, 1) * 2 - 1
        decoded = vae.decode(vae.encode(x).latents).sample.clamp(-1, 1).movedim(1, -1).numpy() / 2 + 0.5
    images = [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in pictures]
    blurred = [np.asarray(image.filter(ImageFilter.GaussianBlur(6)), np.float32) / 255 for image in images]
    mixed = [(one + other) / 2 for one, other in zip(pictures[::2], pictures[1::2], strict=True)]
    real, blur, mean = (
        [nearest_texture(picture, WHOLE).psnr for picture in found] for found in (decoded, blurred, mixed)
    )
    assert min(real) > 24
    assert np.mean(real) > 27 > 20 > np.mean(blur)
    assert max(blur) < min(real)
    assert max(mean) < min(real)


def test_shapes_that_cannot_be_searched() -> None:
    for picture, weight, said in (
        (np.zeros((64, 32, 3), np.float32), np.ones((64, 32), np.float32), r"side a multiple of 4, got \(64, 32, 3\)"),
        (np.zeros((62, 62, 3), np.float32), np.ones((62, 62), np.float32), "side a multiple of 4"),
        (np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.float32), "must count a pixel"),
    ):
        with pytest.raises(ConfigError, match=said):
            nearest_texture(picture, weight)


def test_grown() -> None:
    marked = np.zeros((9, 9), bool)
    marked[4, 0] = True
    wanted = np.zeros_like(marked)
    wanted[2:7, :3] = True
    assert np.array_equal(grown(marked, 2), wanted)
    assert marked.sum() == 1


def test_the_family_is_beside_the_others() -> None:
    """Examples of other families are the same, and so is what tells the data set from others."""
    old, new = procedural(side=64), procedural(side=64, families=tuple(FAMILIES))
    assert old.families == ("subject-driven", "aligned")
    assert new.families == tuple(FAMILIES)
    assert old.about == new.about
    assert (old.open_scenery, new.open_scenery) == (False, True)
    assert [key for key in new.keys if key[1] != OPEN_SCENERY] == list(old.keys)
    by_key = {key: index for index, key in enumerate(new.keys)}
    for index in (0, 1, 2, 3):
        one, other = old[index], new[by_key[old.keys[index]]]
        assert (one.prompt, one.open_scenery) == (other.prompt, False)
        assert one.target.tobytes() == other.target.tobytes()
    two = new[by_key["open-pair/" + old.keys[2][0].split("/")[1], OPEN_SCENERY]]
    assert two.open_scenery
    assert len(two.references) == 2
    with pytest.raises(ConfigError, match="a family must be one of subject-driven, aligned, open scenery, got 'x'"):
        procedural(families=["x"])


def test_only_what_has_one_answer_is_compared_with_it() -> None:
    """Another right answer has the same score; no whole picture has one against the answer."""
    data = procedural(families=[OPEN_SCENERY])
    example = data[0]
    scorer = Scorer(data, ["psnr", "ssim", "subject-psnr", "scenery-psnr", "scenery-contrast"])
    answer = np.asarray(example.target, np.float32) / 255
    alpha = example.mask[..., None]
    texture = Texture("rings", 0.0, 24.0, 100.0, 30.0, 0, 8).picture(SIDE)
    other = np.where(alpha == 1, answer, texture)  # outside and at the edge of the subject
    found = scorer.scores(example, answer)(other)
    assert found["PSNR (dB) vs target"] is found["SSIM vs target"] is None
    assert found["subject PSNR (dB) vs target"] == np.inf
    assert found[NEAREST] > 35
    assert found["PSNR (dB) vs dense"] < 15
    grey = scorer.scores(example, answer)(np.where(alpha == 1, answer, np.float32(0.5)))
    assert grey[NEAREST] < 20
    assert grey["subject PSNR (dB) vs target"] == np.inf
    assert grey[CONTRAST] == pytest.approx(0, abs=1e-7)
    scenery = texture[~grown(example.mask > 0, 2)]
    assert found[CONTRAST] == pytest.approx(np.sqrt(scenery.var(0).mean()), rel=1e-4)
    washed = scorer.scores(example, answer)(np.where(alpha == 1, answer, 0.75 * texture.mean((0, 1)) + 0.25 * texture))
    assert washed[CONTRAST] == pytest.approx(found[CONTRAST] / 4, rel=1e-4)
    dense = scorer.scores(example, answer)(answer)
    assert dense["PSNR (dB) vs dense"] is None
    assert dense[NEAREST] > 35
    assert scorer.columns[NEAREST]
    assert scorer.columns[CONTRAST]
    with pytest.raises(ConfigError, match="must have a pixel that counts, got all hidden"):
        SceneryContrast(np.ones((4, 4), bool))


def test_a_data_set_without_open_scenery_has_no_such_column() -> None:
    for column in (NEAREST, CONTRAST):
        assert column not in Scorer(procedural(), ["psnr"]).columns
        assert column not in Scorer(procedural()).columns
        assert column in Scorer(procedural(families=[OPEN_SCENERY])).columns
    for name in ("scenery-psnr", "scenery-contrast"):
        with pytest.raises(ConfigError, match=f"{name} must have scenery that is left open"):
            Scorer(procedural(), [name])


@pytest.mark.usefixtures("undrawn")
def test_eval_asks_models_what_they_were_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Open scenery is evaluated by itself where all models know it, and of others where it is asked for."""
    for name in ("old", "new"):
        narrow_transformer().save_pretrained(tmp_path / name)
    (tmp_path / "new" / "sparse_ref_attn.json").write_text(json.dumps({"open_scenery": 0.75}))

    def families(out: str, names: list[str], *more: str) -> dict[str, set[bool]]:
        """By family, whether its rows have a PSNR of scenery and one of whole pictures against the answer."""
        models = ["--models", *(f"{name}={tmp_path / name}" for name in names)]
        grid = ["--side", "64", "--steps", "1", "--subjects", "1", "--keep", "100%", "--pictures", "0"]
        measured = ["--metrics", "psnr", *more]
        assert main(["eval", "--out", str(tmp_path / out), *models, *grid, *measured]) == 0
        with (tmp_path / out / "rows.csv").open() as file:
            return {
                row["family"]: (bool(row.get(NEAREST)), bool(row["PSNR (dB) vs target"]))
                for row in csv.DictReader(file)
            }

    old = {"subject-driven": (False, True), "aligned": (False, True)}
    assert families("a", ["old"]) == families("b", ["old", "new"]) == old
    assert families("c", ["new"], "scenery-psnr") == old | {OPEN_SCENERY: (True, False)}
    assert families("d", ["old"], "scenery-psnr", "--families", "open-scenery") == {OPEN_SCENERY: (True, False)}
    summary = (tmp_path / "c" / "summary.md").read_text()
    target = summary.split("## PSNR (dB) vs target")[1].split("##")[0]
    assert OPEN_SCENERY not in target
    assert OPEN_SCENERY in summary.split(f"## {NEAREST}")[1]
    assert families("c2", ["new"], "scenery-contrast") == old | {OPEN_SCENERY: (False, False)}
    assert OPEN_SCENERY in (tmp_path / "c2" / "summary.md").read_text().split(f"## {CONTRAST}")[1]
    assert main(["eval", "--out", str(tmp_path / "a"), "--families", "x"]) == 2
    assert "a family must be one of subject-driven, aligned, open scenery, got 'x'" in capsys.readouterr().err
