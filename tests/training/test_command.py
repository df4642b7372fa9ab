"""``sra train``: the small model and a LoRA of a whole pipeline, end to end on few pixels, and one line per mistake."""

import csv
import json
import re

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sparse_ref_attn.cli import main
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.toy.pipeline import knows_open_scenery, toy_pipeline
from sparse_ref_attn.toy.sprites import SUBJECTS

FEW = ["--steps", "2", "--batch", "2", "--checkpoint-every", "1"]


@pytest.mark.usefixtures("narrow")
def test_the_small_model(sprites, tmp_path):
    dense, dropped = tmp_path / "dense", tmp_path / "dropped"
    assert main(["train", "--sprites", sprites, "--grid", "8", "--out", str(dense), *FEW]) == 0
    assert [row["step"] for row in csv.DictReader((dense / "log.csv").open())] == ["1", "2"]
    about = json.loads((dense / "step-000002/about.json").read_text())
    assert about["train"]["steps"] == 2
    loss = about["train"]["reference_loss"]
    assert "grid=8" in about["command"]
    toy_pipeline(str(dense / "transformer"))
    more = ["--init", str(dense), "--keep", "0.1-0.9", "--out", str(dropped), *FEW]
    assert main(["train", "--sprites", sprites, "--grid", "8", *more]) == 0
    said = json.loads((dropped / "transformer/sparse_ref_attn.json").read_text())
    assert said["random_drop"]["keep"] == [0.1, 0.9]
    assert said["train"]["steps"] == 2
    assert said["train"]["reference_loss"] == loss > 0  # a drop run and its control have one loss
    assert json.loads((dropped / "step-000002/about.json").read_text())["draws"] == {"draws": 2}


@pytest.mark.usefixtures("narrow")
def test_open_scenery_from_the_folder_of_a_transformer(sprites, tmp_path):
    """The run begins from those weights, and its own say that they know open scenery."""
    first, second = tmp_path / "first", tmp_path / "second"
    small = ["train", "--sprites", sprites, "--grid", "8", *FEW]
    assert main([*small, "--out", str(first)]) == 0
    assert not knows_open_scenery(str(first / "transformer"))
    more = ["--init", str(first / "transformer"), "--open-scenery", "0.5", "--lr", "1e-12", "--muon-lr", "1e-12"]
    assert main([*small, "--out", str(second), *more]) == 0
    assert knows_open_scenery(str(second / "transformer"))
    weights = [load_file(folder / "transformer/diffusion_pytorch_model.safetensors") for folder in (first, second)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])
    assert any(weights[0]["proj_out.weight"].flatten().tolist())


@pytest.mark.usefixtures("narrow")
def test_a_lora_of_the_small_model_is_added_to_its_weights(sprites, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    small = ["train", "--sprites", sprites, "--grid", "8", *FEW]
    assert main([*small, "--out", str(first)]) == 0
    assert main([*small, "--init", str(first), "--lora-rank", "2", "--lr", "0.1", "--out", str(second)]) == 0
    before, after = (load_file(each / "transformer/diffusion_pytorch_model.safetensors") for each in (first, second))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(re.search(r"attn\.(to|add)_(q|k|v|out|add)", name) for name in changed)
    assert all(torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 2 for name in changed)


def test_the_autoencoder(sprites, tmp_path):
    from diffusers import AutoencoderTiny

    assert main(["train", "--vae", "--sprites", sprites, "--out", str(tmp_path), *FEW]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000002", "vae"}
    assert AutoencoderTiny.from_pretrained(tmp_path / "vae").config.scaling_factor > 0


def test_a_lora_of_a_pipeline(tmp_path, capsys):
    model, data, out = (tmp_path / name for name in ("model", "data", "out"))
    kontext_pipeline("tiny").save_pretrained(model)
    data.mkdir()
    Image.new("RGB", (40, 40), "red").save(data / "a.png")
    (data / "metadata.jsonl").write_text('{"reference": "a.png", "target": "a.png", "prompt": "the same"}')
    big = ["--side", "2048", "--out", str(out)]
    assert main(["train", "--model", str(model), "--data", str(data), *big, *FEW]) == 2
    assert "at most 1024 for this FluxKontextPipeline, got 2048" in capsys.readouterr().err
    size = ["--side", "32", "--text-tokens", "32", "--lora-rank", "2", "--keep", "0.2-0.9"]
    assert main(["train", "--model", str(model), "--data", str(data), "--out", str(out), *size, *FEW]) == 0
    with safe_open(out / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["sparse_ref_attn"])["random_drop"]["keep"] == [0.2, 0.9]
    pipe = kontext_pipeline("tiny")
    pipe.load_lora_weights(out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "train needs --sprites (the small model) or --data with --model"),
        (["--data", "x"], "--data and --model must be given together"),
        (["--data", "x", "--model", "y", "--vae"], "--vae must come with --sprites"),
        (["--data", "x", "--model", "y", "--reference-loss", "1"], "--reference-loss must come with --sprites"),
        (["--sprites", None, "--reference-loss", "nan"], "reference_loss must be at least 0 and finite, got nan"),
        (["--sprites", "nowhere"], "the folder of sprites must exist, got nowhere"),
        (["--sprites", None, "--init", "nowhere"], "must have a checkpoint, or be a transformer's folder, got nowhere"),
        (["--data", "x", "--model", "y", "--open-scenery", "1"], "--open-scenery must come with --sprites"),
        (["--sprites", None, "--open-scenery", "1.5"], "open_scenery must lie in [0, 1], got 1.5"),
        (["--sprites", None, "--keep", "0-1"], "must be a share or two of them (5%-100%, 0.05-1), got '0-1'"),
        (["--sprites", SUBJECTS, "--keep", "some"], "must be a share or two of them (5%-100%, 0.05-1), got 'some'"),
        (["--sprites", SUBJECTS, "--steps", "0"], "must be a whole number of at least 1, got '0'"),
        (["--sprites", None, "--lora-rank", "2"], "--lora-rank with --sprites must come with --init"),
        (["--sprites", None, "--vae", "--lora-rank", "2"], "--lora-rank is of a transformer, got --vae"),
        (["--sprites", SUBJECTS], "got none for train"),
    ],
)
def test_mistakes(arguments, said, sprites, tmp_path, capsys):
    arguments = [sprites if argument is None else argument for argument in arguments]
    steps = [] if "--steps" in arguments else ["--steps", "1"]
    assert main(["train", "--out", str(tmp_path / "out"), *steps, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("sra: error: ")
    assert said in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()
