"""Caches that reuse activations of earlier steps: refused where the count varies, reset where it seldom does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import FirstBlockCacheConfig

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from tests.contract.state import kinds
from tests.pipelines import CASES

QWEN = CASES["qwen_edit_plus"]  # diffusers' cache fails on FLUX.2 and Kontext, patched or not
RISING = schedules.Linear(0.25, 0.75)


def cached_pipe() -> tuple[Any, list[int]]:
    """A pipeline whose cache takes all blocks after the first from the step before; and the last block's calls."""
    pipe = QWEN.build(layers=3)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    calls: list[int] = []
    pipe.transformer.transformer_blocks[-1].attn.register_forward_pre_hook(lambda module, args: calls.append(1))
    return pipe, calls


@pytest.mark.parametrize("name", ["klein", "qwen_edit_plus"])
def test_a_count_that_varies_is_refused(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef("grid", RISING))
    try:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    except ValueError as error:
        pytest.skip(f"this diffusers has no step cache for {name}: {error}")
    with pytest.raises(sra.IncompatibleError, match=r"changes at every step.*Linear.*budget\.piecewise\(n\)"):
        case.call(pipe)
    pipe.transformer.disable_cache()
    case.call(pipe)
    assert kinds(handle) == ["sparse"] * 3


@pytest.mark.parametrize("cfg", [False, True])
def test_a_constant_count(cfg: bool) -> None:
    pipe, calls = cached_pipe()
    handle = sra.patch(pipe, sra.SparseRef("grid", 0.25))
    image = QWEN.call(pipe, steps=4, cfg=cfg)
    assert len(calls) == 1 + cfg  # the first step alone
    assert np.isfinite(image).all()
    handle.remove()
    dense = QWEN.call(pipe, steps=4, cfg=cfg)
    plain, _ = cached_pipe()
    assert np.array_equal(dense, QWEN.call(plain, steps=4, cfg=cfg))
    assert not np.array_equal(dense, image)


@pytest.mark.parametrize("cfg", [False, True])
def test_a_new_count_computes_in_full(cfg: bool) -> None:
    """What was stored has the length of the step before."""
    pipe, calls = cached_pipe()
    handle = sra.patch(pipe, sra.SparseRef("grid", RISING.piecewise(2)))
    QWEN.call(pipe, steps=6, cfg=cfg)
    kept = [step.kept for step in handle.record.steps]
    assert kept[0] == kept[2] < kept[3] == kept[5]
    assert len(calls) == 2 * (1 + cfg)
    profiled = sra.patch(pipe, sra.SparseRef("mass", 0.25))
    QWEN.call(pipe, steps=4, cfg=cfg)
    assert kinds(profiled) == ["profile", "sparse", "sparse", "sparse"]
    assert len(calls) == 4 * (1 + cfg)
