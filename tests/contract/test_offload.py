"""Offloading by accelerate replaces ``forward`` and re-adds its hooks after every call: the patch does not care."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate.hooks import remove_hook_from_module

import sparse_ref_attn as sra
from tests.contract import patched
from tests.contract.state import MASS, kinds
from tests.pairwise import pairwise
from tests.pipelines import CASES


def by_model(pipe: Any) -> None:
    """Every run ends with `maybe_free_model_hooks`, which removes accelerate's hooks and adds them again."""
    pipe.enable_model_cpu_offload(device="cpu")


def sequential(pipe: Any) -> None:
    """As ``enable_sequential_cpu_offload``: weights lie on the meta device and come layer by layer."""
    for name in ("transformer", "vae"):
        model = getattr(pipe, name)
        remove_hook_from_module(model, recurse=True)
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


@pairwise(
    name=["kontext", "klein", "klein_kv", "qwen_edit_plus"], offload=[by_model, sequential], first=["patch", "offload"]
)
def test_sparse_through_offload(name: str, offload: Callable[[Any], None], first: str) -> None:
    case = CASES[name]
    wanted = patched.picture(case, MASS)
    pipe = case.build()
    if first == "offload":
        offload(pipe)
    handle = sra.patch(pipe, MASS)
    if first == "patch":
        offload(pipe)
    if offload is sequential:
        assert next(pipe.transformer.parameters()).device.type == "meta"
    for _ in range(2):
        assert np.array_equal(wanted, case.call(pipe))
        assert kinds(handle)[0] == "profile"
        assert set(kinds(handle)[1:]) <= {"sparse", "cached"}
        assert hasattr(pipe.transformer, "_hf_hook")
    handle.remove()
    dense = case.dense()
    assert np.array_equal(dense, case.call(pipe))
    assert not np.array_equal(dense, wanted)
