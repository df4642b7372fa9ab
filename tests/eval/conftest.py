"""What a test of an evaluation can do without."""

from __future__ import annotations

import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots, which take three quarters of a small evaluation: for tests of its rows alone."""
    monkeypatch.setattr("sparse_ref_attn.eval.tables.grid_plot", lambda *arguments, **settings: None)
