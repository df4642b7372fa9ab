"""Klein-KV under diffusers' context parallelism: the pipeline itself fails there, and a patch says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.errors import IncompatibleError
from tests.contract.two_processes import check
from tests.pipelines import CASES


def ranks() -> None:
    """What each of two gloo processes sees."""
    from diffusers import ContextParallelConfig

    case = CASES["klein_kv"]
    pipe = case.build()
    alone = case.call(pipe, references=2, steps=2)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(RuntimeError, match="must match the size of tensor"):  # diffusers', without any patch
        case.call(pipe, references=2, steps=2)
    for execute in ("tokens", "cache", "both"):
        with (
            sra.patched(pipe, sra.SparseRef("grid", 0.25, execute)),
            pytest.raises(IncompatibleError, match="cannot run under context parallelism"),
        ):
            case.call(pipe, references=2, steps=2)
    assert np.isfinite(alone).all()


def test_two_processes(tmp_path: Path) -> None:
    check(ranks, tmp_path)
