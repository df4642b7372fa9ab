"""What a notebook asks: short ways to say a configuration, and reports that show themselves."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import PIL.Image
import pytest

import sparse_ref_attn as sra
from tests.latents import CASES

CASE = CASES["kontext"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return CASE.build()


@pytest.fixture(scope="module")
def handle(pipe: Any) -> Iterator[sra.PatchHandle]:
    with sra.patched(pipe, sra.SparseRef("mass", 0.25)) as handle:
        CASE.call(pipe, steps=2)
        yield handle


class Cells(HTMLParser):
    """The texts of an HTML page; every tag must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.texts = list[str](), list[str]()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (0.25, sra.SparseContext(0.25)),
        (7, sra.SparseContext(7)),
        ("recast", sra.ReCAST()),
        ("ReCAST", sra.ReCAST()),
        ("Sparse_Context", sra.SparseContext()),
        ("balanced", sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Every(0.5)))),
        (None, sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Every(0.5)))),
    ],
)
def test_a_share_or_a_presets_name_is_a_configuration(pipe: Any, given: Any, meant: sra.SparseRef) -> None:
    other = CASE.build()
    with sra.patched(other, given) as handle:
        assert handle.config == meant
    sizes = {"references": [(64, 64)], "output": (64, 64), "text_tokens": 32, "steps": 3}
    assert sra.estimate(pipe, given, **sizes) == sra.estimate(pipe, meant, **sizes)


def test_a_share_is_what_the_run_keeps(pipe: Any) -> None:
    other = CASE.build()
    with sra.patched(other, 0.25) as handle:
        CASE.call(other, steps=2)
        assert handle.summary("dict")["reference_tokens"]["share"] == 0.25


def test_a_handle_shows_its_report(handle: sra.PatchHandle) -> None:
    texts = Cells(handle._repr_html_()).texts
    assert texts[0] == repr(handle)
    found = handle.summary("dict")
    assert str(found["references"][0]["tokens"]) in texts
    assert "FLOP ratio" in texts
    assert f"{found['references'][0]['kept_min']:,.0f} (25 %)" in texts


def test_a_handle_without_a_run_shows_its_configuration() -> None:
    with sra.patched(CASE.build(), "recast") as handle:
        assert Cells(handle._repr_html_()).texts == [repr(handle)]


def test_what_stands_in_a_note_is_no_html(handle: sra.PatchHandle) -> None:
    handle.record.notes.append("<b> & more")
    try:
        assert "<b> & more" in Cells(handle.summary("html")).texts
    finally:
        handle.record.notes.pop()


def test_an_estimate_shows_what_its_summary_says(pipe: Any) -> None:
    estimate = sra.estimate(pipe, "recast")
    texts = Cells(estimate._repr_html_()).texts
    for line in estimate.summary().splitlines()[1:]:
        assert any(text in line and len(text) > 10 for text in texts)
    assert estimate.notes[0] in texts


def test_the_overlay_is_a_picture(handle: sra.PatchHandle, tmp_path: Any) -> None:
    image = handle.overlay()
    assert isinstance(image, PIL.Image.Image)
    handle.save_overlay(tmp_path / "kept.png")
    with PIL.Image.open(tmp_path / "kept.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(image))
    assert not np.array_equal(np.asarray(handle.overlay(0)), np.asarray(image))


def test_a_ranking_is_one_line(handle: sra.PatchHandle) -> None:
    """It printed every score."""
    height, width = handle.record.layout.references[0].grid
    assert repr(handle.ranking) == f"Ranking(FLUX.1 Kontext: {height} x {width})"
    without = sra.Ranking([handle.ranking.scores[0]] * 2, [None, (height, width)], "X", "ab")
    assert repr(without) == f"Ranking(X: {height * width} tokens, {height} x {width})"


def test_a_batch_shows_a_row_an_item() -> None:
    case = CASES["klein"]
    pipe = case.build()
    result = sra.BatchResult([], [sra.patch(pipe, 0.5)], 2, 1)
    texts = Cells(result._repr_html_()).texts
    assert texts[:7] == ["Batch", "item", "references", "tokens", "kept", "steps", "FLOPs"]
    assert texts[7:13] == ["0", "0", "0", "-", "-", "-"]
    assert result.summary().splitlines() == [
        "item  references  tokens    kept  steps   FLOPs",
        "   0           0       0       -      -       -",
        texts[-1],
    ]
