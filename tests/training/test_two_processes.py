"""accelerate with two processes on gloo: each its own draws, averaged gradients, a checkpoint that restores both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_ref_attn as sra
from tests.programs import run_pair
from tests.training.batches import Batch, build, gradients, tuned
from tests.training.two_processes import RUNS, STEPS, main


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_pair(main, folder, folder=folder)
    return folder


def notes(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((out / f"notes-{rank}.json").read_text())[name] for rank in range(2)]


@pytest.mark.parametrize("name", list(RUNS))
def test_each_process_has_its_own_draws(out: Path, name: str) -> None:
    """They are those that one process with that rank makes: reproducible on one machine."""
    model = build(name)
    first, second = (each["kept"] for each in notes(out, name))
    assert all(a != b for a, b in zip(first, second, strict=True))
    for rank, kept in enumerate((first, second)):
        handle = sra.patch_for_training(model, RUNS[name][0], rank=rank)
        alone = []
        for step in range(2 * STEPS):
            Batch(name, seed=10 * step + rank).predict(model)
            alone.append([selection.indices.tolist() for selection in handle.kept])
        assert kept[: 2 * STEPS] == alone


@pytest.mark.parametrize("name", list(RUNS))
def test_a_checkpoint_restores_the_draws_of_both(out: Path, name: str) -> None:
    """accelerate stores the main process's state alone: it must serve the other one too."""
    for each in notes(out, name):
        assert each["kept"][STEPS : 2 * STEPS] == each["kept"][2 * STEPS :]
        assert each["kept"][:STEPS] != each["kept"][2 * STEPS :]
        assert each["end"] == each["again"]
    assert notes(out, name)[0]["end"] == notes(out, name)[1]["end"]


@pytest.mark.parametrize("name", list(RUNS))
def test_gradients_are_the_mean_of_both(out: Path, name: str) -> None:
    model = tuned(name)
    parts = []
    for rank in range(2):
        sra.patch_for_training(model, RUNS[name][0], rank=rank)
        parts.append(gradients(model, Batch(name, seed=rank)))
    for rank in range(2):
        got = torch.load(out / f"{name}-{rank}.pt")
        for key, a in parts[0].items():
            torch.testing.assert_close(got[key], (a + parts[1][key]) / 2, rtol=1e-4, atol=1e-6)
