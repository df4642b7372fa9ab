"""A photo, a saved pipeline of two references, and sessions with a model in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_ref_attn.app.model import example
from sparse_ref_attn.app.session import Session
from tests.pictures import picture
from tests.pipelines import CASES


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A photo and a prompt for the small model."""
    photo, prompt = example("place", 3)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    photo.save(path)
    return str(path), prompt


@pytest.fixture(scope="session")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "klein"
    CASES["klein"].build().save_pretrained(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> tuple[str, str]:
    for i in range(2):
        picture(64, 96, i).save(tmp_path / f"{i}.png")
    return str(tmp_path / "0.png"), str(tmp_path / "1.png")


@pytest.fixture
def session() -> Session:
    made = Session()
    made.load()
    return made
