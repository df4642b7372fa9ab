"""A folder of pairs: every pair once a turn, and words for what is wrong with it."""

import json
import shutil

import pytest

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.training.folder import FolderBatches
from tests.training.test_loop import _kontext


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    root = tmp_path / "pairs"
    root.mkdir()
    lines = []
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(root / f"r{i}.png")
        Image.new("RGB", (30, 40), colour).save(root / f"t{i}.png")
        lines.append(json.dumps({"reference": f"r{i}.png", "target": f"t{i}.png", "prompt": f"make it {colour}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def test_a_folder_gives_every_pair_once_a_turn(folder):
    pipe = _kontext()
    index = folder / "metadata.jsonl"
    index.write_text(index.read_text().replace("\n", "\n\n"))  # a blank line is no pair
    data = FolderBatches(str(folder), 1, side=32, text_tokens=8)
    turns = [[data._row(3 * turn + i) for i in range(3)] for turn in range(20)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    batch = data(pipe, 0, 0, 1)
    assert batch.target.shape == batch.references.shape == (1, 64, 64)
    assert batch.arguments["img_ids"].shape == (128, 3)
    assert batch.arguments["encoder_hidden_states"].shape[1] == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"must hold metadata\.jsonl"),
        (b"\xff\xfe", "must be readable text in UTF-8"),
        ("", "at least one pair"),
        ("{", "line 1 must be a JSON object"),
        ('{"reference": "r0.png", "target": "t0.png"}', "must have the texts reference, target, prompt"),
        (
            '{"reference": "r9.png", "target": "t0.png", "prompt": ""}',
            r"an image must be a file, got .*r9\.png, which does not exist",
        ),
        ('{"reference": "bad.png", "target": "t0.png", "prompt": ""}', r"format that Pillow reads, got .*bad\.png"),
    ],
)
def test_bad_folders(folder, text, said):
    index = folder / "metadata.jsonl"
    (folder / "bad.png").write_bytes(b"no picture")
    if text is None:
        index.unlink()
    else:
        index.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=said):
        FolderBatches(str(folder), 1)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"side": 20}, "side must be a multiple of 16 pixels, got 20"),
        ({"text_tokens": 513}, r"text_tokens must lie in \[1, 512\]"),
        ({"side": 1040}, "at most 1024 for this FluxKontextPipeline, got 1040"),
    ],
)
def test_pictures_and_prompts_larger_than_the_model_takes(folder, settings, said):
    with pytest.raises(ConfigError, match=said):
        FolderBatches(str(folder), 1, **settings).check(_kontext())
