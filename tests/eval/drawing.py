"""Evaluations and comparisons without most of what takes their time: plots, and metrics that are networks."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_ref_attn.cli import comparing, main
from sparse_ref_attn.eval import page, tables
from sparse_ref_attn.eval.metrics import Psnr, Ssim

__all__ = ["compare_pixels", "draw_on_page", "draw_only", "leave_page_undrawn", "main_undrawn"]


def draw_only(patch: pytest.MonkeyPatch, *metrics: str, over: tuple[str, ...] = ("keep", "share", "work")) -> None:
    """From here on an evaluation draws the plots of these columns over these."""
    real = tables.grid_plot

    def plot(means: Any, metric: str, *arguments: Any, **settings: Any) -> None:
        if metric in metrics and settings.get("over", "keep") in over:
            real(means, metric, *arguments, **settings)

    patch.setattr(tables, "grid_plot", plot)


def draw_on_page(patch: pytest.MonkeyPatch, *metrics: str) -> None:
    """From here on a comparison's page has empty plots, but of these."""
    real = page.quality_plot

    def plot(rows: Any, metric: Any, over: str) -> str:
        return real(rows, metric, over) if metric.name in metrics else "<svg></svg>"

    patch.setattr(page, "quality_plot", plot)


def leave_page_undrawn(patch: pytest.MonkeyPatch) -> None:
    """From here on a comparison's page has no plots."""
    patch.setattr(page, "quality_plot", lambda rows, metric, over: "")


def compare_pixels(patch: pytest.MonkeyPatch) -> None:
    """From here on a comparison measures PSNR and SSIM alone, and its page has no plots."""
    patch.setattr(comparing, "_metrics", lambda options: [Psnr(), Ssim()])
    leave_page_undrawn(patch)


def main_undrawn(arguments: list[str]) -> int:
    """A program of its own that runs one command without plots."""
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch)
        return main(arguments)
