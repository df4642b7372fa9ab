"""What a loaded pipeline is given besides: LoRAs at their scales, weights in fewer bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import ConfigError, VersionError
from sparse_ref_attn.eval import quantization
from sparse_ref_attn.eval.loading import load_pipeline
from sparse_ref_attn.eval.loras import Lora, check_loras
from sparse_ref_attn.training.lora import add_lora, save_lora
from tests.pictures import picture
from tests.pipelines import CASES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, a LoRA of it, and one of a pipeline of another width."""
    directory = tmp_path_factory.mktemp("models")
    for name, head_dim in (("kontext", 16), ("wide", 32)):
        pipe = CASES["kontext"].build(head_dim=head_dim)
        pipe.save_pretrained(directory / name)
        add_lora(pipe.transformer, 2)
        random = torch.Generator().manual_seed(3)
        weights = {
            name: torch.randn(p.shape, generator=random) for name, p in pipe.transformer.named_parameters()
            if p.requires_grad
        }  # fmt: skip
        save_lora(pipe, directory / f"{name}_lora", weights, None)
    return directory


def drawn(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return CASES["kontext"].call(pipe, steps=2)


def test_a_lora_counts_by_its_scale(saved: Path) -> None:
    def with_loras(*loras: Lora) -> np.ndarray:
        return drawn(load_pipeline(str(saved / "kontext"), loras=loras)[0])

    folder, file = saved / "kontext_lora", saved / "kontext_lora" / "pytorch_lora_weights.safetensors"
    plain, whole = with_loras(), with_loras(Lora(str(folder)))
    assert np.abs(plain - whole).mean() > 0.01
    assert np.array_equal(with_loras(Lora(str(folder), 0.0)), plain)
    half = with_loras(Lora(str(file), 0.5))
    assert np.abs(half - whole).mean() > 1e-3
    assert np.allclose(with_loras(Lora(str(file), 0.25), Lora(str(file), 0.25)), half, atol=1e-4)


def test_what_is_no_lora_is_told_before_the_model(saved: Path, tmp_path: Path) -> None:
    save_file({"proj.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for given, words in (
        (Lora(str(tmp_path / "other.safetensors")), "must hold LoRA matrices, got .* with 1 tensors such as proj"),
        (Lora(str(tmp_path / "broken.safetensors")), "must be a readable safetensors file"),
        (Lora(str(tmp_path / "notes.txt")), r"must end in \.safetensors"),
        (Lora(str(tmp_path / "empty")), "must hold one .safetensors file, got .* with none"),
        (Lora(str(tmp_path)), "with broken.safetensors, other.safetensors"),
        (Lora("none.safetensors"), "none.safetensors, which does not exist"),
        (Lora("./none"), "./none, which does not exist"),
        (Lora("anywhere", float("nan")), "must be a finite number, got nan"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_loras([given])
    check_loras([Lora("somebody/lora")])


def test_a_lora_of_another_model_is_told_in_one_line(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a LoRA must be one that FluxKontextPipeline can load, got .*wide_lora: "):
        load_pipeline(str(saved / "kontext"), loras=[Lora(str(saved / "wide_lora"))])
    foreign = {f"unet.down.to_q.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(foreign, tmp_path / "unet.safetensors")
    with pytest.raises(ConfigError, match=r"must have weights for the transformer of FluxKontextPipeline, got .*unet"):
        load_pipeline(str(saved / "kontext"), loras=[Lora(str(tmp_path / "unet.safetensors"))])


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_quantized_weights_take_less_and_draw_nearly_the_same(kind: str, saved: Path) -> None:
    pipe, _ = load_pipeline(str(saved / "kontext"), quantize=kind, dtype="bfloat16")
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    assert type(weight).__module__.startswith("torchao")
    full = drawn(load_pipeline(str(saved / "kontext"), dtype="bfloat16")[0])
    error = np.abs(drawn(pipe) - full).mean()
    assert 0 < error < 0.1


def test_a_package_that_is_missing_is_named_with_its_install_line(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    absent = ("bitsandbytes", "peft", "torchao")
    for kind, package in (("nf4", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(VersionError, match=f"quantize {kind} needs {package}: pip install {package}"):
            quantization.check_quantization(kind, "cuda")
    with pytest.raises(VersionError, match=r"LoRA needs peft: pip install 'sparse-ref-attn\[train\]'"):
        check_loras([Lora("somebody/lora")])
    photo = tmp_path / "a.png"
    picture(32, 32).save(photo)
    command = ["run", photo, "-p", "x", "-o", tmp_path / "o.png", "--model", saved / "kontext", "--quantize", "int8"]
    assert main([str(word) for word in command]) == 2
    assert "sra: error: quantize int8 needs torchao: pip install torchao" in capsys.readouterr().err


def test_four_bits_need_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="quantize nf4 needs a CUDA device, got cpu; int8 needs none"):
        quantization.check_quantization("nf4", "cpu")
    with pytest.raises(ConfigError, match="quantize must be one of int8, float8, nf4, got 'int4'"):
        quantization.check_quantization("int4", "cpu")
