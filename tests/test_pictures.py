"""A photo stands upright whoever opens it, whichever way up the camera stored it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from benchmarks.random_pipelines import photos
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.datasets import load_examples
from sparse_ref_attn.pictures import check_image, open_image
from sparse_ref_attn.toy.sprites import held_out, load_sprites
from sparse_ref_attn.training.folder import FolderBatches
from tests.pictures import picture

ROOT = Path(__file__).parents[1]
# how a camera stores an upright picture under each orientation of EXIF
STORED = {
    1: None,
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_90,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_270,
}
UPRIGHT = picture(48, 32, 3)


def store(path: Path, upright: PIL.Image.Image, orientation: int, **options: Any) -> None:
    turn = STORED[orientation]
    tag = PIL.Image.Exif()
    tag[0x0112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(path, exif=tag, **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("webp", {"lossless": True}), ("tiff", {})])
def test_every_orientation(orientation: int, suffix: str, options: dict[str, Any], tmp_path: Path) -> None:
    store(tmp_path / f"photo.{suffix}", UPRIGHT, orientation, **options)
    got = open_image(tmp_path / f"photo.{suffix}")
    assert got.mode == "RGB"
    assert np.array_equal(np.asarray(got), np.asarray(UPRIGHT))


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_training_and_evaluation_see_the_same_photo(orientation: int, tmp_path: Path) -> None:
    """References, targets and masks; the folder of pairs and every published layout."""
    for name in ("photo.png", "edited.png"):
        store(tmp_path / name, UPRIGHT.resize((64, 64)), orientation if name == "photo.png" else 1)
    store(tmp_path / "mask.png", UPRIGHT.convert("L").resize((64, 64)), orientation)
    line = {"reference": "photo.png", "target": "photo.png", "prompt": "x", "mask": "mask.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    want = np.asarray(UPRIGHT.resize((64, 64)))
    batches = FolderBatches(str(tmp_path), 1, side=64)
    assert torch.equal(batches._pixels("photo.png"), batches._pixels("edited.png"))
    (one,) = load_examples(str(tmp_path))
    assert all(np.array_equal(np.asarray(x), want) for x in (*one.references, one.target))
    assert np.array_equal(one.mask, np.asarray(UPRIGHT.convert("L").resize((64, 64)), np.float32) / 255)
    bench = tmp_path / "bench"
    (bench / "annotation_images" / "0").mkdir(parents=True)
    store(bench / "annotation_images" / "0" / "a.png", UPRIGHT.resize((64, 64)), orientation)
    entry = {"0": {"image_path": "0/a.png", "editing_instruction": "x"}}
    (bench / "mapping_file.json").write_text(json.dumps(entry))
    (two,) = load_examples(str(bench), "pie-bench")
    assert np.array_equal(np.asarray(two.references[0]), want)


def test_a_subject_stands_upright(tmp_path: Path) -> None:
    sprite = UPRIGHT.convert("RGBA")
    alpha = np.zeros((32, 48), np.uint8)
    alpha[4:28, 4:40] = 255
    sprite.putalpha(PIL.Image.fromarray(alpha))
    found = []
    for orientation in (1, 6):
        folder = tmp_path / str(orientation)
        folder.mkdir()
        store(folder / "subject.png", sprite, orientation)
        found.append(load_sprites(str(folder), "held-out" if held_out("subject") else "train").pixels[64])
    assert np.array_equal(*found)


def test_the_bundled_photo_of_the_benchmarks_is_the_one_of_the_commands() -> None:
    photo = open_image(ROOT / "sparse_ref_attn" / "assets" / "photo.jpg").resize((64, 64))
    assert np.array_equal(np.asarray(photos(1, 64)[0]), np.asarray(photo))


def test_there_is_no_other_way_to_open_one() -> None:
    """``Image.open`` stands in one file of the package, the benchmarks and the examples."""
    found = set()
    for folder in ("sparse_ref_attn", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            if not any(word in text for word in ("Image", "imread", "load_image")):
                continue
            calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
            for call in calls:
                name = ast.unparse(call.func)
                if name.endswith(("Image.open", "imread", "load_image")):
                    found.add(path.relative_to(ROOT).as_posix())
    assert found == {"sparse_ref_attn/pictures.py"}


def test_what_cannot_be_read_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for act in (open_image, check_image):
        with pytest.raises(ConfigError, match=r"an image must be a file, got .*none\.png, which does not exist"):
            act(tmp_path / "none.png")
        with pytest.raises(ConfigError, match=r"in a format that Pillow reads, got .*text\.png"):
            act(tmp_path / "text.png")


GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sixteen.png", GREY.astype(np.uint16) * 257),
        ("sixteen.tiff", GREY.astype(np.uint16) * 257),
        ("sixteen.pgm", GREY.astype(np.uint16) * 257),
        ("float.tiff", (GREY / 255).astype(np.float32)),
        ("eight.png", GREY),
        ("bits.png", GREY > 100),
    ],
)
def test_grey_values_become_bytes_by_the_range_of_their_mode(name: str, values: np.ndarray, tmp_path: Path) -> None:
    """A 16-bit grey PNG came out white, a float TIFF black."""
    PIL.Image.fromarray(values).save(tmp_path / name)
    want = 255 * values.astype(np.uint8) if values.dtype == bool else GREY
    for mode in ("RGB", "L", "RGBA"):
        got = np.asarray(open_image(tmp_path / name, mode))
        assert np.array_equal(got if mode == "L" else got[..., 0], want)
        assert mode != "RGBA" or (got[..., 3] == 255).all()


def test_sixteen_bits_stand_upright(tmp_path: Path) -> None:
    grey = np.asarray(UPRIGHT.convert("L"))
    tag = PIL.Image.Exif()
    tag[0x0112] = 6
    stored = PIL.Image.fromarray(np.rot90(grey.astype(np.uint16) * 257).copy())
    stored.save(tmp_path / "photo.png", exif=tag)
    assert np.array_equal(np.asarray(open_image(tmp_path / "photo.png", "L")), grey)


@pytest.mark.parametrize("how", ["RGBA", "LA", "P", "RGB with a transparent colour"])
def test_what_is_transparent_is_put_on_white_and_said(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its alpha was dropped without a word, and the colour behind it came out."""
    image = PIL.Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (80, 80, 80, 255))
    options: dict[str, Any] = {}
    if how == "P":
        image, options = image.convert("RGB").quantize(4), {"transparency": b"\x00\xff"}
        if image.getpixel((0, 0)):
            options["transparency"] = b"\xff\x00"
    elif how.startswith("RGB "):
        image, options = image.convert("RGB"), {"transparency": (0, 0, 0)}
    else:
        image = image.convert(how)
    image.save(tmp_path / "logo.png", **options)
    assert np.asarray(open_image(tmp_path / "logo.png")).tolist() == [[[255] * 3, [80] * 3]]
    assert "logo.png: its transparent parts are put on white" in caplog.text
    assert np.asarray(open_image(tmp_path / "logo.png", "RGBA"))[0, 0, 3] == 0
    with pytest.raises(ConfigError, match=r"a mask must be opaque, .* got .*logo\.png"):
        open_image(tmp_path / "logo.png", "L")


def test_half_transparent_is_half_white_and_opaque_is_not_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    UPRIGHT.convert("RGBA").save(tmp_path / "opaque.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "opaque.png")), np.asarray(UPRIGHT))
    assert not caplog.text
    PIL.Image.new("RGBA", (1, 1), (100, 0, 200, 51)).save(tmp_path / "glass.png")
    assert open_image(tmp_path / "glass.png").getpixel((0, 0)) == (224, 204, 244)  # 255 + (colour - 255) / 5


@pytest.mark.parametrize(
    ("name", "image", "options", "words"),
    [
        ("moving.gif", UPRIGHT, {"save_all": True, "append_images": [picture(48, 32, 4)]}, "one picture, got .* 2 of"),
        ("moving.webp", UPRIGHT, {"save_all": True, "append_images": [picture(48, 32, 4)]}, "one picture, got .* 2 of"),
        ("pages.tiff", UPRIGHT, {"save_all": True, "append_images": [UPRIGHT]}, "one picture, got .* 2 of"),
        ("hdr.tiff", PIL.Image.fromarray(np.array([[0, 255]], np.float32)), {}, r"in \[0, 1\], got .* with 0 to 255"),
        ("nan.tiff", PIL.Image.fromarray(np.array([[0, np.nan]], np.float32)), {}, r"in \[0, 1\], got .* with nan to"),
        ("ints.tiff", PIL.Image.fromarray(np.array([[0, 255]], np.int32)), {}, "known white, got .* 32-bit whole"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    name: str, image: PIL.Image.Image, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A GIF was its first frame, without a word."""
    image.save(tmp_path / name, **options)
    with pytest.raises(ConfigError, match=words):
        open_image(tmp_path / name)


def test_one_frame_and_the_previews_of_a_camera_are_one_picture(tmp_path: Path) -> None:
    UPRIGHT.save(tmp_path / "still.gif")
    UPRIGHT.save(tmp_path / "camera.mpo", save_all=True, append_images=[UPRIGHT.resize((8, 8))])
    assert open_image(tmp_path / "still.gif").size == open_image(tmp_path / "camera.mpo").size == (48, 32)
    for act in (check_image, open_image):
        UPRIGHT.save(tmp_path / "moving.gif", save_all=True, append_images=[picture(48, 32, 4)])
        with pytest.raises(ConfigError, match="one picture"):
            act(tmp_path / "moving.gif")
