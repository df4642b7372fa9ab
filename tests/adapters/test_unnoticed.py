"""A patch that does nothing says so: once, in the log, in the report and when it is taken off."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.base import references_from_ids
from tests.pipelines import CASES
from tests.training.batches import Batch, build

GRID = sra.SparseRef("grid", 0.5)


def grid(frame: int, height: int, width: int, left: int = 0) -> torch.Tensor:
    ids = torch.cartesian_prod(torch.tensor([frame]), torch.arange(height), torch.arange(width))
    ids[:, 2] += left
    return ids


def said(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.message for record in caplog.records)


def test_a_transformer_whose_forward_is_never_called(caplog: pytest.LogCaptureFixture) -> None:
    """Codebases that run a model through a function of its parts."""
    pipe = CASES["kontext"].build()
    handle = sra.patch(pipe, GRID)
    own = type(pipe.transformer).forward
    pipe.transformer.__class__ = type("Around", (type(pipe.transformer),), {"__call__": own})  # past the hooks
    CASES["kontext"].call(pipe)
    with pytest.raises(sra.SparseRefError, match=r"must have taken place; the pipeline's scheduler was set 1 times"):
        handle.summary()
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        handle.remove()
        handle.remove()
    assert said(caplog, "did not go through the transformer's own call") == 1


def test_a_later_run_past_the_patch_is_told_beside_the_earlier_report(caplog: pytest.LogCaptureFixture) -> None:
    pipe = CASES["kontext"].build()
    handle = sra.patch(pipe, GRID)
    CASES["kontext"].call(pipe)
    assert said(caplog, "did not go through") == 0
    handle.summary()
    own = type(pipe.transformer).forward
    pipe.transformer.__class__ = type("Around", (type(pipe.transformer),), {"__call__": own})
    CASES["kontext"].call(pipe)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        handle.summary()
        handle.summary()
    assert said(caplog, "did not go through the transformer's own call") == 1


def test_a_transformer_that_was_replaced(caplog: pytest.LogCaptureFixture) -> None:
    pipe = CASES["klein"].build()
    handle = sra.patch(pipe, GRID)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    CASES["klein"].call(pipe)
    with pytest.raises(sra.SparseRefError, match=r"pipe\.transformer is another one .*patch again"):
        handle.summary()
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        handle.remove()
    assert said(caplog, "pipe.transformer is another one") == 1


def test_a_compiled_wrapper_is_no_replacement(caplog: pytest.LogCaptureFixture) -> None:
    pipe = CASES["klein"].build()
    handle = sra.patch(pipe, GRID)
    pipe.transformer = torch.nn.Sequential(pipe.transformer)  # any module that holds it
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        handle.remove()
    assert said(caplog, "another one") == 0


def test_calls_without_references_and_unknown_layouts_are_told_apart() -> None:
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, GRID)
    case.call(pipe, references=0)
    with pytest.raises(sra.SparseRefError, match="the calls since the patch had no reference tokens"):
        handle.summary()
    seen: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    case.call(pipe, references=0, steps=1)
    hook.remove()
    beside = torch.cat([grid(0, 8, 8), grid(0, 8, 12, left=8)])
    x = torch.randn(1, len(beside), seen["hidden_states"].shape[2])
    with torch.no_grad():
        pipe.transformer(**{**seen, "hidden_states": x, "img_ids": beside})
    with pytest.raises(sra.SparseRefError, match="the layout of the calls since the patch was not known: 160 rows"):
        handle.summary()


def test_a_reference_with_the_generations_own_frame_is_no_picture_without_references() -> None:
    assert references_from_ids(grid(0, 4, 4)) == ((0, 16), ())
    assert references_from_ids(torch.cat([grid(0, 4, 4), grid(0, 4, 4, left=4)])) is None
    assert references_from_ids(torch.cat([grid(0, 4, 4), grid(0, 2, 3, left=9)])) is None


def test_validation_in_train_mode_drops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Under no_grad every denoising step would drop other tokens, and spend the draws of training."""
    case = CASES["kontext"]
    pipe = case.build()
    want = case.call(pipe)
    pipe.transformer.train()
    handle = sra.patch_for_training(pipe.transformer, sra.RandomDrop(keep=(0.1, 0.3), full_probability=0.0))
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        for _ in range(2):
            assert np.array_equal(case.call(pipe), want)
        handle.remove()
    assert handle.state_dict() == {"draws": 0}
    assert said(caplog, "nothing is dropped in calls without gradients") == 1
    assert said(caplog, "the training patch never dropped a token") == 1


def test_a_training_patch_that_drops_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build("kontext").train(), Batch("kontext")
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        handle = sra.patch_for_training(model, sra.RandomDrop(keep=(0.1, 0.3)))
        batch.loss(model)
        handle.remove()
    assert not caplog.records
