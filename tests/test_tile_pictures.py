"""What is reported and drawn of a run whose tiles read reference tokens of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sparse_ref_attn as sra
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.overlay import tile_overlay
from sparse_ref_attn.overlay.tile_reads import _often
from sparse_ref_attn.record import RunRecord, StepRecord, TileRecord
from sparse_ref_attn.report import summary
from sparse_ref_attn.types import Reference, RefSelection, TokenLayout
from tests.pipelines import CASES


@pytest.fixture
def run() -> RunRecord:
    """A generation of 2 x 3 in tiles of 2, two references of 2 x 2 tokens; the text reads tokens 0 and 7."""
    layout = TokenLayout(14, 1, (0, 6), (Reference(6, 4, (2, 2)), Reference(10, 4, (2, 2))))
    record = RunRecord(layout, 1, 2, config={"execute": "cache"})
    kept = RefSelection(torch.tensor([0, 7]), (4, 4))
    read = torch.tensor([[1.5, 0.75], [0.5, 0.25]])
    record.steps = [
        StepRecord(0, "profile", 8, 1, lambda: 2.0),
        StepRecord(1, "cached", 2, 1, lambda: 1.0, selection=kept, means=2, read=read),
    ]
    record.mass = [torch.ones(4) / 8, torch.ones(4) / 8]
    record.tiles = TileRecord((2, 3), side=2, cell=2, text=True)
    record.tiles.reads[0] = (torch.tensor([0, 7, 1, 2, 6, 1], dtype=torch.int32), (0, 2, 4, 6))
    return record


def test_the_report_says_what_tiles_read_and_not_the_runs_ranking(run: RunRecord) -> None:
    got = summary(run, "dict")
    assert [row["kept_min"] for row in got["references"]] == [1.5, 0.5]
    assert [row["mass_kept"] for row in got["references"]] == [0.75, 0.25]
    assert got["tiles"] == {"tile": 2, "tiles": [1, 2], "cell": 2, "means": 2}
    assert got["by_step"]["means"] == [0, 2]
    words = " ".join(summary(run).split())
    assert "each of 1 x 2 tiles of 2 x 2, in each layer; the rest as the means of 2 cells of 2 x 2" in words
    run.tiles = None
    assert summary(run, "dict")["tiles"] is None


def test_how_often_a_token_is_read_counts_the_generations_tokens(run: RunRecord) -> None:
    assert run.tiles is not None
    often = _often(run, run.tiles, 0)
    np.testing.assert_allclose(often, np.array([0, 6, 4, 0, 0, 0, 2, 0]) / 6)  # tiles of four and of two


def test_the_tokens_of_a_tile_keep_their_colours(run: RunRecord) -> None:
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    run.pixels = [red, red]
    first, second, alone = (np.asarray(tile_overlay(run, 0, tile)) for tile in ((0, 0), (0, 1), None))

    def red_share(image: np.ndarray) -> int:
        return int((image == (255, 0, 0)).all(-1).sum())

    assert red_share(first) > 0.9 * red_share(second) > 0  # two tokens each
    assert red_share(alone) == 0
    assert not np.array_equal(first, second)
    assert np.array_equal(np.asarray(tile_overlay(run, 0, 1)), second)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layer": 1}, r"layer must be an int in \[0, 1\), got 1"),
        ({"layer": True}, "layer must be an int"),
        ({"layer": 0, "tile": 2}, r"tile must be a number in \[0, 2\), or the row and column of one of 1 x 2 tiles"),
        ({"layer": 0, "tile": (1, 0)}, r"got \(1, 0\)"),
        ({"layer": 0, "tile": "0"}, "got '0'"),
        ({"layer": 0, "tile": (0, True)}, "got"),
        ({"layer": 0, "tile": -1}, "got -1"),
    ],
)
def test_places_that_are_not_there(run: RunRecord, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tile_overlay(run, **given)


def test_a_picture_of_a_run(tmp_path: Path) -> None:
    case, pipe = CASES["klein"], CASES["klein"].build()
    setting = sra.SparseRef("mass", 0.25, execute=sra.Cache(per="tile", tile=3, refresh=sra.Never()))
    with sra.patched(pipe, setting) as handle:
        case.call(pipe, steps=2, references=2)
        handle.save_overlay(tmp_path / "tile.png", layer=3, tile=(2, 1))
        handle.save_overlay(tmp_path / "layer.png", layer=3)
        handle.save_overlay(tmp_path / "run.png")
        assert "in each layer" in handle.summary()
        with pytest.raises(ConfigError, match="tile must come with the layer in which it reads"):
            handle.overlay(tile=3)
        with pytest.raises(ConfigError, match="a layer is drawn of the last step that read a part, got step=1"):
            handle.overlay(1, layer=0)
    sizes = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert {size[0] for size in sizes.values()} == {1400}
    with sra.patched(pipe, sra.SparseRef("mass", 0.25)) as handle:
        case.call(pipe, steps=2)
        with pytest.raises(ConfigError, match="layer must come with a run whose tiles read tokens of their own"):
            handle.save_overlay(tmp_path / "none.png", layer=0)
