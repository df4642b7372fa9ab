"""Blocks compiled for one length each, and a budget with many."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparse_ref_attn as sra
from tests.pipelines import CASES


@pytest.mark.parametrize("budget", [sra.Linear(0.1, 0.9), sra.Linear(0.1, 0.9).piecewise(3)], ids=["varies", "pieces"])
def test_blocks_compiled_for_one_length_each(budget: Any) -> None:
    """dynamic=False and a length at every step die at torch's recompile limit: refused before the first block."""
    case = CASES["klein"]
    pipe = case.build(layers=1, single=1)
    torch._dynamo.reset()
    sra.patch(pipe, sra.SparseRef("grid", budget))
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
    if isinstance(budget, sra.Linear):
        with pytest.raises(
            sra.IncompatibleError, match=r"at most 8 sequence lengths .* got 14 .*piecewise.*dynamic=None"
        ):
            case.call(pipe, steps=14)
        case.call(pipe, steps=4)
    else:
        case.call(pipe, steps=14)
