"""``sra train --isolate`` and the example's flag: what the weights say, what runs them, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.toy.pipeline import toy_pipeline
from tests.contract.state import kinds
from tests.pipelines import CASES

SMALL = ["--grid", "8", "--batch", "2", "--checkpoint-every", "1"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.usefixtures("narrow")
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
    assert said["isolate"] == sra.Isolation("reference").to_dict()
    assert sra.RandomDrop.from_dict(said["random_drop"]).keep == (0.2, 0.9)

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


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pipeline's folder, and that of a LoRA which was trained with each reference by itself."""
    folder = tmp_path_factory.mktemp("lora")
    model, data, out = (folder / name for name in ("model", "data", "out"))
    kontext_pipeline("tiny").save_pretrained(model)
    data.mkdir()
    Image.new("RGB", (40, 40), "red").save(data / "a.png")
    (data / "metadata.jsonl").write_text('{"reference": "a.png", "target": "a.png", "prompt": "the same"}')
    more = ["--side", "32", "--text-tokens", "32", "--lora-rank", "2", "--steps", "2", "--batch", "2"]
    where = ["--model", str(model), "--data", str(data), "--out", str(out)]
    assert main(["train", *where, *more, "--isolate", "reference"]) == 0
    return model, out


def rewritten(lora: Path, folder: Path, isolate: dict[str, Any] | None) -> Path:
    """The LoRA's file as one that was trained otherwise would be."""
    folder.mkdir()
    path = folder / "pytorch_lora_weights.safetensors"
    with safe_open(lora / path.name, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["lora_adapter_metadata"])
    config["transformer.auto_mapping"]["sparse_ref_attn"]["isolate"] = isolate
    save_file(load_file(lora / path.name), path, metadata | {"lora_adapter_metadata": json.dumps(config)})
    return folder


def test_a_lora_is_run_as_its_file_says(lora: tuple[Path, Path], tmp_path: Path) -> None:
    with safe_open(lora[1] / "pytorch_lora_weights.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["sparse_ref_attn"])
    assert said == {"random_drop": None, "isolate": {"per": "reference", "timestep": 0.0}}
    case, each = CASES["kontext"], sra.Isolation("reference")
    pipe = kontext_pipeline("tiny")
    early = sra.patch(pipe)
    pipe.load_lora_weights(lora[1])
    with pytest.raises(sra.IncompatibleError, match="put on or taken off since the patch: patch again"):
        case.call(pipe, steps=2)
    early.remove()
    with sra.patched(pipe) as handle:
        got = case.call(pipe, steps=3)
        assert (kinds(handle), handle.record.exactness) == (["cached"] * 3, "exact")
    with sra.patched(pipe, sra.SparseRef("grid", 1.0, "cache", isolated=each)):
        assert np.array_equal(case.call(pipe, steps=3), got)
    for config in ("sparse-context", sra.SparseRef("grid", 1.0, "cache", isolated=False)):
        with pytest.raises(sra.IncompatibleError, match="weights of the LoRA 'default_0' were trained with references"):
            sra.patch(pipe, config)
    with pytest.raises(sra.IncompatibleError, match=r"trained with Isolation\(per='reference'.*per='all'"):
        sra.patch(pipe, sra.SparseRef("grid", 1.0, "cache", isolated=sra.Isolation()))
    pipe.disable_lora()
    sra.patch(pipe, "sparse-context").remove()
    pipe.enable_lora()
    pipe.load_lora_weights(rewritten(lora[1], tmp_path / "joint", None), adapter_name="joint")
    pipe.set_adapters(["default_0", "joint"])
    with pytest.raises(sra.IncompatibleError, match=r"must have been trained alike, got .*'joint': with the picture"):
        sra.patch(pipe)
    pipe.set_adapters(["joint"])
    with pytest.raises(sra.IncompatibleError, match="the LoRA 'joint' were trained with references that see the pict"):
        sra.patch(pipe, sra.SparseRef("grid", 1.0, "cache", isolated=True))
    pipe.load_lora_weights(rewritten(lora[1], tmp_path / "odd", {"par": 1}), adapter_name="odd")
    pipe.set_adapters(["odd"])
    with pytest.raises(sra.ConfigError, match="must have per and timestep alone"):
        sra.patch(pipe)


def test_run_takes_the_mode_from_the_lora_or_the_flag(
    lora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, trained = lora
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(trained / "pytorch_lora_weights.safetensors"), bare)
    picture = str(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "red").save(picture)

    def run(lora: Path, *more: str) -> tuple[int, str]:
        """The exit code, and what was said."""
        where = ["--model", str(model), "--lora", str(lora), "-o", str(tmp_path / "out.png"), "--steps", "2"]
        size = ["--width", "32", "--height", "32", "--set", "max_area=1024", "--set", "_auto_resize=false"]
        code = main(["run", picture, "-p", "the same", "--json", *where, *size, *more])
        return code, "".join(capsys.readouterr())

    pictures = []
    for arguments in ((trained,), (bare, "--isolated", "reference"), (bare,)):
        code, told = run(*arguments)
        assert code == 0, told
        pictures.append(np.asarray(Image.open(tmp_path / "out.png")))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    for flags in (["--preset", "recast"], ["--isolated", "all"]):
        code, told = run(trained, *flags)
        assert code != 0
        assert "the weights of the LoRA 'lora_1' were trained with" in told
    for flags, words in (
        (["--isolated", "--refresh", "2"], "isolated goes without refresh"),
        (["--isolated", "none"], "must be all or reference, got 'none'"),
    ):
        code, told = run(bare, *flags)
        assert (code, words in told) == (2, True), told
