"""Each test of a training loop starts as a program does: accelerate keeps its state for the whole process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState

from sparse_ref_attn.toy import pipeline
from sparse_ref_attn.toy.sprites import SUBJECTS, held_out, load_sprites
from tests.small_model import narrow_transformer


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the state, and without the environment, that an earlier `Accelerator` left behind."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """``sra train`` trains a model of few and narrow blocks: a step of the one that ships takes seconds on a CPU."""
    monkeypatch.setattr(pipeline, "build_transformer", narrow_transformer)


@pytest.fixture(scope="session")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of shipped subjects under names that the split gives to training."""
    folder = tmp_path_factory.mktemp("sprites")
    for name in load_sprites(SUBJECTS, "held-out").names[:8]:
        trained = next(f"{name}-{i}" for i in range(100) if not held_out(f"{name}-{i}"))
        (folder / f"{trained}.webp").symlink_to(f"{SUBJECTS}/{name}.webp")
    return str(folder)
