"""``sra train --isolate`` and the example's flag: what the weights say, what runs them, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.toy.pipeline import toy_pipeline
from tests.contract.state import kinds

SMALL = ["--grid", "8", "--batch", "2", "--checkpoint-every", "1"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_the_small_model(sprites: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped after a step and gone on with: the same weights, bit for bit. They are run as they were trained."""

    def train(out: str, *more: str) -> int:
        return main(["train", "--sprites", sprites, "--out", str(tmp_path / out), *SMALL, *more])

    how = ("--isolate", "reference", "--keep", "0.2-0.9")
    assert train("once", "--steps", "2", *how) == 0
    assert train("twice", "--steps", "1", *how) == 0
    assert train("twice", "--steps", "2", *how) == 0
    once, twice = (load_file(tmp_path / out / WEIGHTS) for out in ("once", "twice"))
    assert all(torch.equal(once[key], twice[key]) for key in once)
    for other in (("--isolate", "--keep", "0.2-0.9"), ("--keep", "0.2-0.9"), ()):
        assert train("twice", "--steps", "3", *other) == 2
        assert "a run must go on as it began" in capsys.readouterr().err
    assert once.keys() == twice.keys()
    said = json.loads((tmp_path / "once/transformer/sparse_ref_attn.json").read_text())
    assert sra.IsolateReferences.from_dict(said["isolate"]).per == "reference"
    assert said["isolate"]["drop"] == said["random_drop"]

    pipe = toy_pipeline(str(tmp_path / "once/transformer"))
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "swap rows red to-blue", "image": Image.new("RGB", (64, 64), "green"), "num_inference_steps": 2}
    call |= {"height": 64, "width": 64, "max_area": 64 * 64, "_auto_resize": False, "max_sequence_length": 16}
    handle = sra.patch(pipe)
    assert np.isfinite(np.asarray(pipe(**call).images[0])).all()
    assert kinds(handle) == ["cached", "cached"]
    assert handle.record.exactness == "exact"
    with pytest.raises(sra.IncompatibleError, match="trained with references that run by themselves"):
        sra.patch(pipe, "sparse-context")

    assert main(["train", "--vae", "--isolate", "--sprites", sprites, "--out", str(tmp_path), "--steps", "1"]) == 2
    assert "--isolate trains a transformer, got --vae" in capsys.readouterr().err


def test_a_lora_says_it_in_its_file(tmp_path: Path) -> None:
    model, data, out = (tmp_path / name for name in ("model", "data", "out"))
    kontext_pipeline("tiny").save_pretrained(model)
    data.mkdir()
    Image.new("RGB", (40, 40), "red").save(data / "a.png")
    (data / "metadata.jsonl").write_text('{"reference": "a.png", "target": "a.png", "prompt": "the same"}')
    more = ["--side", "32", "--text-tokens", "32", "--lora-rank", "2", "--steps", "2", "--batch", "2", "--isolate"]
    assert main(["train", "--model", str(model), "--data", str(data), "--out", str(out), *more]) == 0
    with safe_open(out / "pytorch_lora_weights.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["sparse_ref_attn"])
    assert said == {"random_drop": None, "isolate": {"per": "all", "timestep": 0.0, "drop": None}}
    pipe = kontext_pipeline("tiny")
    pipe.load_lora_weights(out)
    sra.patch(pipe, sra.SparseRef("grid", 1.0, execute=sra.Cache(isolated=True)))
