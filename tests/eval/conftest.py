"""What a test of an evaluation can do without."""

from __future__ import annotations

import pytest

from tests.eval.drawing import compare_pixels, draw_only


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of an evaluation's rows alone."""
    draw_only(monkeypatch)


@pytest.fixture
def pixels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of a comparison that are not of its metrics or plots."""
    compare_pixels(monkeypatch)
