"""A training patch that drops nothing says so, and one that drops says nothing."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sparse_ref_attn as sra
from tests.adapters.test_unnoticed import PAST, said
from tests.pipelines import CASES
from tests.training.batches import Batch, build, tuned


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


def test_training_through_the_parts_is_said_at_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = tuned("kontext"), Batch("kontext")
    handle = sra.patch_for_training(model, sra.RandomDrop(keep=(0.1, 0.3)))
    batch.loss(model)
    assert handle.kept
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        with torch.no_grad():
            batch.loss(model.forward)  # validation
        assert not caplog.records
        for _ in range(2):
            batch.loss(model.forward).backward()
            assert not handle.kept
    assert said(caplog, PAST) == 1


def test_a_checkpointed_last_layer_runs_again_in_the_backward_unsaid(caplog: pytest.LogCaptureFixture) -> None:
    class Again(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.layer, x, use_reentrant=False)

    model, batch = tuned("kontext"), Batch("kontext")
    handle = sra.patch_for_training(model, sra.RandomDrop(keep=(0.1, 0.3)))
    model.proj_out, runs = Again(model.proj_out), []
    model.proj_out.layer.register_forward_pre_hook(lambda *call: runs.append(call))
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        batch.loss(model).backward()
    assert len(runs) == 2
    assert handle.kept
    assert not caplog.records


def test_training_calls_without_references_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build("kontext").train(), Batch("kontext", references=())
    handle = sra.patch_for_training(model)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        for _ in range(7):
            batch.loss(model)
        assert not caplog.records
        for _ in range(3):
            batch.loss(model)
        assert said(caplog, "the first 8 training calls had no reference tokens") == 1
    handle.remove()


def test_a_training_patch_that_drops_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build("kontext").train(), Batch("kontext")
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        handle = sra.patch_for_training(model, sra.RandomDrop(keep=(0.1, 0.3)))
        batch.loss(model)
        handle.remove()
    assert not caplog.records
