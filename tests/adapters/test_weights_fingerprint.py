"""The fingerprint of weights: of what identifies them, however they are stored, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.weights import weights_fingerprint
from sparse_ref_attn.errors import IncompatibleError, LayoutError
from sparse_ref_attn.eval.models import _weights_id
from tests import programs
from tests.contract.test_offload import by_model, sequential
from tests.latents import CASES

CASE = CASES["klein_kv"]


def as_gguf(model: nn.Module, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0) -> None:
    """As ``from_single_file("model.gguf")``: blocks of bytes in place of the linear weights."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer.in_features % 32 == 0:
                new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32, "cpu")
                raw = torch.from_numpy(gguf.quants.quantize(layer.weight.data.numpy(), kind).copy())
                new.weight, new.bias = GGUFParameter(raw, quant_type=kind), layer.bias
                setattr(module, name, new)


def as_fp8(model: nn.Module) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


STORED: dict[str, Callable[[nn.Module], Any]] = {
    "gguf": as_gguf,
    "gguf of four bits": lambda model: as_gguf(model, gguf.GGMLQuantizationType.Q4_0),
    "int8 of torchao": lambda model: quantize_(model, Int8WeightOnlyConfig(version=2)),
    "float8 of torchao": lambda model: quantize_(model, Float8WeightOnlyConfig()),
    "float8 between the layers' calls": as_fp8,
    "bfloat16": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", STORED)
def test_a_reference_cache_of_quantised_weights(name: str, tmp_path: Path) -> None:
    """Kept, saved and used again: by the same weights in the same pipeline and in a new one, and by no others."""
    setting = sra.SparseRef("mass", 0.25, execute="cache")

    def build(scale: float = 1.0) -> Any:
        pipe = CASE.build(heads=4)
        if name == "bfloat16":
            pipe.to(torch.bfloat16)
        with torch.no_grad():
            for weight in pipe.transformer.parameters():
                weight.mul_(scale)
        STORED[name](pipe.transformer)
        return pipe

    pipe = build()
    with sra.patched(pipe, setting) as handle:
        handle.capture()
        CASE.call(pipe, steps=2)
        handle.reference_cache.save(tmp_path / "cache")
    cache = sra.ReferenceCache.load(tmp_path / "cache")
    for same in (pipe, build()):
        with sra.patched(same, setting) as handle:
            handle.reuse(cache)
            CASE.call(same, steps=2)
            assert [step.kind for step in handle.record.steps] == ["cached"] * 2
    other = build(1.5)
    with sra.patched(other, setting) as handle:
        handle.reuse(cache)
        with pytest.raises(LayoutError, match="the same model's weights"):
            CASE.call(other, steps=2)


def test_every_way_to_store_the_same_numbers_is_another_and_each_change_is_seen() -> None:
    seen = set()
    for change in (lambda model: None, *STORED.values()):
        model = CASE.build(heads=4).transformer
        change(model)
        mark = weights_fingerprint(model)
        assert mark == weights_fingerprint(model)
        seen.add(mark)
    assert len(seen) == len(STORED) + 1


def test_the_same_bytes_of_another_gguf_kind_are_other_weights() -> None:
    raw = torch.zeros(4, 34, dtype=torch.uint8)
    marks = set()
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        layer = nn.Linear(2, 2, bias=False)
        layer.weight = GGUFParameter(raw[:, : 34 if kind == gguf.GGMLQuantizationType.Q8_0 else 18], quant_type=kind)
        marks.add(weights_fingerprint(layer))
        layer.weight = GGUFParameter(raw, quant_type=gguf.GGMLQuantizationType.Q8_0)
        layer.weight.quant_type = kind
        marks.add(weights_fingerprint(layer))
    assert len(marks) == 3


def to_disk(pipe: Any, folder: Path) -> None:
    accelerate.disk_offload(pipe.transformer, str(folder), torch.device("cpu"))


def in_groups(pipe: Any, folder: Path) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def in_groups_to_disk(pipe: Any, folder: Path) -> None:
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    )


OFFLOADS = {
    "by model": lambda pipe, folder: by_model(pipe),
    "layer by layer": lambda pipe, folder: sequential(pipe),
    "to disk": to_disk,
    "in groups": in_groups,
    "in groups to disk": in_groups_to_disk,
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_weights_are_read_where_they_lie(name: str, tmp_path: Path) -> None:
    """Never from the placeholders, which diffusers leaves uninitialised; and they are the weights in memory."""
    want = weights_fingerprint(CASE.build().transformer)
    pipe = CASE.build()
    OFFLOADS[name](pipe, tmp_path)
    for p in pipe.transformer.parameters():
        if "disk" in name and not p.is_meta:
            p.data.fill_(float("nan"))  # as memory that nobody filled may be
    assert weights_fingerprint(pipe.transformer) == want
    with sra.patched(pipe, sra.SparseRef("mass", 0.25, execute="cache")) as handle:
        handle.capture()
        image = CASE.call(pipe, steps=2)
        handle.reuse(handle.reference_cache)
        assert np.isfinite(image).all()
        CASE.call(pipe, steps=2)
    assert weights_fingerprint(pipe.transformer) == want
    other = CASE.build(seed=1)
    OFFLOADS[name](other, tmp_path / "other")
    assert weights_fingerprint(other.transformer) != want


def tell() -> None:
    model = CASE.build().transformer
    as_gguf(model)
    print(weights_fingerprint(model))


def test_the_next_process_says_the_same(tmp_path: Path) -> None:
    model = CASE.build().transformer
    as_gguf(model)
    assert programs.run(tell, log=tmp_path / "log").split()[-1] == weights_fingerprint(model)


def packed(scale: float) -> nn.Module:
    """Weights that are no parameters: torch's own dynamic quantisation packs them."""
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape) * scale)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def test_weights_that_are_neither_parameters_nor_buffers() -> None:
    assert weights_fingerprint(packed(1.0)) == weights_fingerprint(packed(1.0))
    assert weights_fingerprint(packed(1.0)) != weights_fingerprint(packed(2.0))


def test_buffers_and_sparse_weights_count() -> None:
    layer = nn.BatchNorm1d(4)
    before = weights_fingerprint(layer)
    layer.running_mean += 1
    assert weights_fingerprint(layer) != before
    marks = set()
    for at in (0, 1):
        sparse = nn.Module()
        dense = torch.zeros(4, 4)
        dense[at, 2] = 1.0
        sparse.weight = nn.Parameter(dense.to_sparse())
        marks.add(weights_fingerprint(sparse))
    assert len(marks) == 2


def test_weights_that_are_nowhere_are_refused_in_words() -> None:
    layer = nn.Linear(4, 4, device="meta")
    with pytest.raises(IncompatibleError, match="got weight on the meta device, and no offload hook"):
        weights_fingerprint(layer)
    with pytest.raises(IncompatibleError, match="got weight not initialised"):
        weights_fingerprint(nn.LazyLinear(4))
    freed = nn.Linear(4, 4)
    freed.weight.untyped_storage().resize_(0)
    with pytest.raises(IncompatibleError, match="weight was freed"):
        weights_fingerprint(freed)


def test_an_evaluation_knows_weights_in_any_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    seen = {_weights_id([tmp_path])}
    for name in ("model.gguf", "pytorch_model.bin", "model.safetensors"):
        for content in (b"one", b"two"):
            (tmp_path / name).write_bytes(content)
            assert _weights_id([tmp_path]) == _weights_id([tmp_path])
            seen.add(_weights_id([tmp_path]))
    assert len(seen) == 7
