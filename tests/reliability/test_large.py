"""Very many references, and very large ones."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.record import RunRecord, StepRecord
from sparse_ref_attn.selection import Selector
from sparse_ref_attn.selection.base import References
from sparse_ref_attn.selection.ranking import per_reference
from sparse_ref_attn.types import Reference, RefSelection, TokenLayout
from tests.contract.state import state
from tests.latents import CASES
from tests.pictures import generator, picture
from tests.reliability.alike import same
from tests.reliability.layouts import ROWS, Layout

PIXEL_SELECTORS: dict[str, Selector] = {
    "edges": sra.Edges(),
    "saliency": sra.Saliency(),
    "mask": sra.SubjectMask(None),  # made to size
    "boxes": sra.Boxes([[(0.25, 0.25, 0.5, 0.75)]]),
    "union": sra.Union((sra.Edges(), sra.Grid())),
}


def pictures(count: int) -> list[PIL.Image.Image]:
    """References of five shapes in turn."""
    shapes = [(64, 64), (96, 64), (64, 96), (64, 128), (128, 64)]
    return [picture(*shapes[i % len(shapes)], i) for i in range(count)]


def many_references(count: int, config: sra.SparseRef, name: str = "klein", steps: int = 2) -> sra.PatchHandle:
    """A pipeline call with `count` references: counts add up, and everything that is told afterwards can be told."""
    case = CASES[name]
    pipe = case.build(layers=1, single=1)
    case.call(pipe, steps=1)
    before = state(pipe)
    handle = sra.patch(pipe, config)
    case.call(pipe, references=1, steps=steps, image=pictures(count))
    record = handle.record
    assert len(record.layout.references) == count
    assert all(step.selection is None or len(step.selection.counts()) == count for step in record.steps)
    assert 0 < record.steps[-1].kept < record.layout.reference_tokens
    assert len(handle.summary("dict")["references"]) == count
    handle.remove()
    assert state(pipe) == before
    return handle


def test_forty_references(tmp_path: Path) -> None:
    """More images than a pipeline encodes for anything else: a tap that remembered 32 had no pixels of the first."""
    handle = many_references(40, sra.SparseContext(0.25, "edges"), steps=1)
    handle.save_overlay(tmp_path / "kept.png")
    assert PIL.Image.open(tmp_path / "kept.png").width == 1400


def test_sixty_four_references_of_a_transformer() -> None:
    """The dense model that hides the dropped tokens, over 64 grids of many shapes."""
    grids = tuple((1 + i % 5, 1 + i % 3) for i in range(64))
    layout = Layout("klein", grids, 1, 2, 1, torch.float32, 0)
    model = CASES["klein"].build(layers=1, single=1).transformer
    handle = sra.patch(model, sra.SparseRef("mass", sra.Constant(64, per="all"), floor=1))
    outputs, steps = layout.run(model, handle), handle.record.steps
    handle.remove()
    assert [step.kept for step in steps] == [sum(layout.sizes), 64]
    assert steps[1].selection is not None
    assert steps[1].selection.counts() == (1,) * 64
    for got, want in zip(outputs, layout.masked(model, steps, both=True), strict=True):
        torch.testing.assert_close(got[:, :ROWS], want[:, :ROWS], rtol=0, atol=1e-4)
    assert same(layout.run(model)[0], outputs[0])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("klein", sra.SparseRef("mass", sra.Constant(512, per="all"), floor=1)),
        ("klein", sra.SparseContext(0.2, "edges")),
        ("klein", sra.SparseRef("mass", 0.2, profile="in_flight")),
        ("klein_kv", sra.SparseRef("mass", 0.2, "cache", rerank_every=1)),
        ("klein_kv", sra.SparseRef("edges", 0.2, "both")),
    ],
    ids=["mass", "edges", "in_flight", "cache", "both"],
)
def test_sixty_four_references(
    name: str, config: sra.SparseRef, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    handle = many_references(64, config, name)
    handle.save_overlay(tmp_path / "kept.png")
    record_property("count", 64)
    record_property("detail", f"{handle.record.layout.reference_tokens} tokens in {name}, 2 steps")


def photo(side: int) -> torch.Tensor:
    """(1, 3, side, side) in [-1, 1]: a bright square in the box that `PIXEL_SELECTORS` looks at, on a soft ramp."""
    ramp = torch.linspace(-1, -0.8, side).expand(1, 3, side, side).clone()
    ramp[:, :, side // 4 : 3 * side // 4, side // 4 : side // 2] = 0.9
    return ramp


def select(name: str, side: int, folder: Path) -> float:
    """Share of the kept tokens that the square covers (grown by a token), from a picture of `side` x `side` pixels."""
    cells = side // 16
    layout = TokenLayout(ROWS + cells**2, 0, (0, ROWS), (Reference(ROWS, cells**2, (cells, cells)),))
    pixels = photo(side)
    tokens = torch.nn.functional.avg_pool2d(pixels, 16).flatten(2).mT
    mask = np.zeros((side, side), bool)
    mask[side // 4 : 3 * side // 4, side // 4 : side // 2] = True
    selector = sra.SubjectMask(mask) if name == "mask" else PIXEL_SELECTORS[name]
    scores = selector.score(References(layout, tokens, [pixels]))
    kept = RefSelection(per_reference(scores, (cells,)), layout.sizes)
    record = RunRecord(layout, 1, 1, pixels=[pixels], scores=scores)
    record.steps.append(StepRecord(0, "sparse", kept.kept, 1, selection=kept))
    from sparse_ref_attn.overlay import save_overlay

    save_overlay(record, folder / "kept.png")
    assert PIL.Image.open(folder / "kept.png").width == 1400
    square = np.zeros((cells, cells), bool)
    square[cells // 4 - 1 : 3 * cells // 4 + 1, cells // 4 - 1 : cells // 2 + 1] = True
    return float(square.flatten()[kept.indices.numpy()].mean())


@pytest.mark.parametrize("name", list(PIXEL_SELECTORS))
def test_a_quarter_megapixel(name: str, tmp_path: Path) -> None:
    assert select(name, 512, tmp_path) > (0.4 if name == "union" else 0.95)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", list(PIXEL_SELECTORS))
def test_sixteen_megapixels(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    share = select(name, 4096, tmp_path)
    after = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for key, value in (("count", 1), ("resident_start", before), ("resident_end", after),
                       ("detail", "the process's most, before and after")):  # fmt: skip
        record_property(key, value)
    assert share > (0.4 if name == "union" else 0.95)
    assert after - before < 4 * 2**30


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_sixteen_megapixels_through_a_pipeline(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """4096 x 4096 pixels: the pipeline makes them as large as it does, and the selector sees what it encoded."""
    case = CASES["klein"]
    pipe = case.build(layers=1, single=1)
    handle = sra.patch(pipe, sra.SparseContext(0.05, "grid"))
    red = PIL.Image.new("RGB", (4096, 4096), "red")
    request: dict[str, Any] = {"steps": 1, "image": [red], "generator": generator(0)}
    with torch.no_grad():
        case.call(pipe, **request)
    record = handle.record
    handle.save_overlay(tmp_path / "kept.png")
    record_property("count", 1)
    record_property("detail", f"{record.layout.reference_tokens} reference tokens, {record.steps[0].kept} kept")
    assert record.steps[0].kept == round(0.05 * record.layout.reference_tokens)
