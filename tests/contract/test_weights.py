"""Adapters, quantised weights and gradients under a patch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import sparse_ref_attn as sra
from tests.contract.state import ALL, GRID, MASS, kinds, steps
from tests.pairwise import pairwise
from tests.pipelines import CASES, Case

MODELS = {name: CASES[name] for name in ("kontext", "klein", "qwen_edit_plus")}
cases = pytest.mark.parametrize("case", MODELS.values(), ids=list(MODELS))


def lora_config() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0"], init_lora_weights=False)


def add(pipe: Any) -> None:
    torch.manual_seed(5)
    pipe.transformer.add_adapter(lora_config(), "style")


def load(pipe: Any) -> None:
    """From a state dict, as ``load_lora_weights(path)`` does after reading the file."""
    other = pipe.transformer.__class__(**pipe.transformer.config)
    torch.manual_seed(5)
    other.add_adapter(lora_config())
    weights = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(other).items()}
    pipe.load_lora_weights(weights, adapter_name="style")


@pairwise(case=MODELS, lora=[add, load], first=["patch", "lora"])
def test_lora(case: Case, lora: Callable[[Any], None], first: str) -> None:
    plain, bare = case.build(), case.dense()
    lora(plain)
    dense = case.call(plain)
    sra.patch(plain, MASS)
    wanted = case.call(plain)
    assert len({image.tobytes() for image in (bare, dense, wanted)}) == 3

    pipe = case.build()
    if first == "lora":
        lora(pipe)
    handle = sra.patch(pipe, MASS)
    if first == "patch":
        lora(pipe)
    assert np.array_equal(wanted, case.call(pipe))
    pipe.fuse_lora()
    np.testing.assert_allclose(wanted, case.call(pipe), atol=1e-4)
    assert kinds(handle) == ["profile", "sparse", "sparse"]
    pipe.unfuse_lora()
    handle.remove()
    np.testing.assert_allclose(dense, case.call(pipe), atol=1e-4)
    handle = sra.patch(pipe, ALL)
    pipe.unload_lora_weights()
    np.testing.assert_allclose(bare, case.call(pipe), atol=1e-4)
    assert kinds(handle)[0] == "profile"


@cases
def test_int8_weights(case: Case) -> None:
    pipe = case.build(heads=4)
    full = case.call(pipe)
    quantize_(pipe.transformer, Int8WeightOnlyConfig(version=2))
    dense = case.call(pipe)
    assert not np.array_equal(full, dense)
    handle = sra.patch(pipe, ALL)
    assert np.array_equal(dense, case.call(pipe))
    handle = sra.patch(pipe, MASS)
    sparse = case.call(pipe)
    assert kinds(handle) == ["profile", "sparse", "sparse"]
    assert not np.array_equal(dense, sparse)
    assert handle.flops().ratio > 1
    handle.remove()
    assert np.array_equal(dense, case.call(pipe))
    late = case.build(heads=4)
    sra.patch(late, MASS)
    quantize_(late.transformer, Int8WeightOnlyConfig(version=2))
    assert np.array_equal(sparse, case.call(late))


@cache
def given(case: Case) -> list[tuple[tuple, dict[str, Any]]]:
    """Arguments of the transformer in each step of a run."""
    pipe = case.build()
    calls: list[tuple[tuple, dict[str, Any]]] = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    case.call(pipe)
    return calls


@cache
def gradients(case: Case, config: sra.SparseRef, checkpointing: bool, removed: bool) -> tuple[dict, sra.PatchHandle]:
    """Of a LoRA, through three calls of the transformer with one run's inputs."""
    pipe, calls = case.build(), given(case)
    add(pipe)
    transformer = pipe.transformer.train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    handle = sra.patch(transformer, config)
    handle.begin(len(calls))
    loss = torch.zeros(())
    for step, (args, kwargs) in enumerate(calls):
        handle.step(step)
        output = transformer(*args, **{**kwargs, "hidden_states": kwargs["hidden_states"].clone().requires_grad_()})
        loss = loss + output[0].pow(2).mean()
    if removed:
        handle.remove()
    loss.backward()
    found = {name: p.grad for name, p in transformer.named_parameters() if "lora" in name}
    assert len(found) > 4
    return found, handle


@pytest.mark.parametrize(
    ("case", "config"), list(zip(MODELS.values(), (MASS, GRID, MASS), strict=True)), ids=list(MODELS)
)
def test_gradient_checkpointing(case: Case, config: sra.SparseRef) -> None:
    """Blocks run again in the backward pass, when the hooks have left and the patch may be off."""
    wanted, handle = gradients(case, config, checkpointing=False, removed=False)
    assert all(grad is not None and grad.abs().max() > 0 for grad in wanted.values())
    dense, _ = gradients(case, ALL, checkpointing=False, removed=False)
    assert any(not torch.equal(grad, dense[name]) for name, grad in wanted.items())
    assert kinds(handle)[1:] == ["sparse", "sparse"]
    for removed in (False, True):
        got, again = gradients(case, config, checkpointing=True, removed=removed)
        assert steps(again) == steps(handle)
        for name, grad in wanted.items():
            assert torch.equal(grad, got[name]), name
