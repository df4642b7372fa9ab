"""A photo and the saved pipelines that commands are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pictures import picture
from tests.pipelines import CASES


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name in ("kontext", "kontext_inpaint", "klein", "klein_kv"):
        CASES[name].build().save_pretrained(directory / name)
    return directory


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    picture(128, 64, 3).save(path)
    return path
