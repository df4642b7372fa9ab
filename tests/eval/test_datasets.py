"""Data sets on disk, each a tiny folder in the layout that is published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.datasets import load_examples
from sparse_ref_attn.eval.examples import FAMILIES, Examples, procedural
from sparse_ref_attn.toy.sprites import SUBJECTS, load_sprites


def paint(path: Path, colour: str, size: tuple[int, int] = (24, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def lines(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))


def colour(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((1, 1))


def test_folder(tmp_path: Path) -> None:
    for name, shade in (("a", "#ff0000"), ("b", "#00ff00"), ("t", "#0000ff")):
        paint(tmp_path / f"{name}.png", shade)
    paint(tmp_path / "m.png", "white")
    lines(
        tmp_path / "metadata.jsonl",
        {"reference": "a.png", "prompt": "red"},
        {"reference": ["a.png", "b.png"], "prompt": "both", "target": "t.png", "mask": "m.png",
         "reference_mask": ["m.png", "m.png"], "id": "two", "family": "pairs"},
    )  # fmt: skip
    data = load_examples(str(tmp_path))
    assert data.keys == (("0", "all"), ("two", "pairs"))
    assert data.targets
    assert data.masks
    assert data.reference_masks
    one, two = data
    assert (one.prompt, one.target, one.mask, one.reference_masks) == ("red", None, None, None)
    assert [colour(image) for image in two.references] == [(255, 0, 0), (0, 255, 0)]
    assert colour(two.target) == (0, 0, 255)
    assert two.mask.shape == (16, 24)
    assert two.mask.min() == 1
    assert len(two.reference_masks) == 2
    assert data.chosen(["pairs"]) == [1]


def test_kontext_bench(tmp_path: Path) -> None:
    paint(tmp_path / "test" / "images" / "0000.jpg", "red")
    paint(tmp_path / "test" / "images" / "0001.jpg", "blue")
    lines(
        tmp_path / "test" / "metadata.jsonl",
        {"file_name": "images/0000.jpg", "key": "0000", "category": "Character Reference", "instruction": "on a boat"},
        {"file_name": "images/0001.jpg", "key": "0001", "category": "Text Editing", "instruction": "say no"},
    )
    data = load_examples(str(tmp_path), "kontext-bench")
    assert data.families == ("Character Reference", "Text Editing")
    assert (data[1].id, data[1].prompt, data[1].target) == ("0001", "say no", None)
    assert data[1].references[0].size == (24, 16)
    assert load_examples(str(tmp_path / "test"), "kontext-bench").keys == data.keys


def test_dreambench_plus(tmp_path: Path) -> None:
    for family, name, text in (
        ("object", "00", "clock\na clock\na blue clock\n"),
        ("live_subject/animal", "07", "cat\na cat"),
    ):
        paint(tmp_path / "data" / "images" / family / f"{name}.jpg", "red")
        path = tmp_path / "data" / "captions" / family / f"{name}.txt"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    data = load_examples(str(tmp_path), "dreambench++")
    assert data.keys == (("live_subject/animal/07/0", "animal"), ("object/00/0", "object"), ("object/00/1", "object"))
    assert [example.prompt for example in data] == ["a cat", "a clock", "a blue clock"]
    (tmp_path / "data" / "images" / "object" / "00.jpg").unlink()
    with pytest.raises(ConfigError, match=r"must have its picture, got none at .*object/00\.jpg"):
        load_examples(str(tmp_path), "dreambench++")


def test_pie_bench(tmp_path: Path) -> None:
    paint(tmp_path / "annotation_images" / "1_change_object_80" / "1_artificial" / "1.jpg", "red", (512, 512))
    entry = {
        "image_path": "1_change_object_80/1_artificial/1.jpg", "original_prompt": "a [cat]", "editing_type_id": "1",
        "editing_prompt": "a [dog]", "editing_instruction": "make it a dog", "blended_word": "cat dog",
        "mask": [512 * 100 + 50, 20, 512 * 101 + 50, 20],
    }  # fmt: skip
    plain = {**entry, "mask": []}
    (tmp_path / "mapping_file.json").write_text(json.dumps({"100": entry, "101": plain}))
    one, two = load_examples(str(tmp_path), "pie-bench")
    assert (one.id, one.family, one.prompt) == ("100", "1_change_object_80", "make it a dog")
    inside = np.zeros((512, 512))
    inside[100:102, 50:70] = 1
    assert np.array_equal(one.mask[1:-1, 1:-1], inside[1:-1, 1:-1])
    assert one.mask[0].all()
    assert one.mask[:, -1].all()
    assert np.array_equal(one.mask, one.reference_masks[0])
    assert two.mask is None


def test_the_procedural_task_is_held_out() -> None:
    data = procedural(side=64)
    names = load_sprites(SUBJECTS, "held-out").names
    assert len(data) == 2 * len(names) >= 128
    assert {key.split("/")[0] for key, family in data.keys if family == "aligned"} == set(FAMILIES["aligned"])
    by_id = {key: i for i, (key, _) in enumerate(data.keys)}
    pair = data[by_id[f"pair/{names[1]}"]]
    assert len(pair.references) == len(pair.reference_masks) == 2
    assert pair.target.size == (64, 64)
    assert pair.mask.shape == (64, 64)
    assert np.array_equal(np.asarray(data[5].references[0]), np.asarray(data[5].references[0]))
    assert data.chosen(["aligned"], 2) == [1, 3]
    with pytest.raises(ConfigError, match="families must be among subject-driven, aligned, got style"):
        data.chosen(["style"])
    with pytest.raises(ConfigError, match=f"must have 1000 examples, got {len(names)}"):
        data.chosen(None, 1000)
    with pytest.raises(ConfigError, match="64 or 128 pixels, got 96"):
        procedural(side=96)


def test_bad_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a folder, got"):
        load_examples(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="must be one of folder, kontext-bench"):
        load_examples(str(tmp_path), "coco")
    with pytest.raises(ConfigError, match=r"must have metadata\.jsonl, got none"):
        load_examples(str(tmp_path))
    with pytest.raises(ConfigError, match=r"mapping_file\.json, got none"):
        load_examples(str(tmp_path), "pie-bench")
    with pytest.raises(ConfigError, match=r"captions/\*\*/\*\.txt beside images/, got none"):
        load_examples(str(tmp_path), "dreambench++")
    index = tmp_path / "metadata.jsonl"
    index.write_text("")
    with pytest.raises(ConfigError, match="at least one example, got an empty file"):
        load_examples(str(tmp_path))
    index.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="must be readable text in UTF-8"):
        load_examples(str(tmp_path))
    index.write_text("{")
    with pytest.raises(ConfigError, match="line 1 must be a JSON object"):
        load_examples(str(tmp_path))
    lines(index, {"reference": "a.png"})
    with pytest.raises(ConfigError, match="line 1 must have the texts prompt"):
        load_examples(str(tmp_path))
    lines(index, {"reference": "a.png", "prompt": "x"})
    with pytest.raises(ConfigError, match=r"an image must be a file, got .*a\.png, which does not exist"):
        load_examples(str(tmp_path))
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"format that Pillow reads, got .*a\.png"):
        load_examples(str(tmp_path))
    paint(tmp_path / "a.png", "red")
    lines(index, {"reference": "a.png", "prompt": "x", "reference_mask": ["a.png", "a.png"]})
    with pytest.raises(ConfigError, match="a mask for each reference, got 2 for 1"):
        load_examples(str(tmp_path))
    with pytest.raises(ConfigError, match="ids of examples must differ, got a"):
        Examples({}, [("a", "f"), ("a", "f")], lambda i: None)
