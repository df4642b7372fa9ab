"""Rows are neither lost nor double, whatever a killed process leaves behind."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.rows import KEY, RowStore


def row(example: str, seed: int, keep: float, x: float | None = 1.5) -> dict[str, object]:
    return {"model": "m", "family": "f", "example": example, "seed": seed, "method": "edges", "keep": keep, "x": x}


def every() -> list[dict[str, object]]:
    return [row(name, seed, keep) for name, seed, keep in itertools.product(("é/1", "b, c"), (0, 2, 10), (0.5, 0.05))]


def filled(folder: Path, shares: list[list[dict[str, object]]]) -> RowStore:
    folder.mkdir()
    for process, rows in enumerate(shares):
        for one in rows:
            RowStore(folder, ["x"]).append(process, [one])
    return RowStore(folder, ["x"])


def test_the_order_is_that_of_the_keys(tmp_path: Path) -> None:
    """The same file, whoever made which row and in which order."""
    rows = every()
    one = filled(tmp_path / "one", [rows])
    merged = one.merge()
    mixed = rows.copy()
    random.Random(0).shuffle(mixed)
    filled(tmp_path / "three", [mixed[:5], mixed[5:6], mixed[6:]]).merge()
    assert (tmp_path / "one" / "rows.csv").read_bytes() == (tmp_path / "three" / "rows.csv").read_bytes()
    assert [r["seed"] for r in merged[:6]] == ["0", "0", "2", "2", "10", "10"]
    assert merged[0]["keep"] == "0.5"
    assert len(one.keys()) == len(merged) == 12


def test_a_line_cut_anywhere_is_no_row(tmp_path: Path) -> None:
    """A process may die at any byte, inside a letter too."""
    filled(tmp_path / "whole", [[row("é", 0, 0.5), row("éé", 1, 0.25)]])
    written = (tmp_path / "whole" / "rows.part-0.csv").read_bytes()
    (tmp_path / "cut").mkdir()
    part = tmp_path / "cut" / "rows.part-0.csv"
    for end in range(len(written) + 1):
        part.write_bytes(written[:end])
        keys = RowStore(tmp_path / "cut", ["x"]).keys()
        assert len(keys) == max(0, written[:end].count(b"\n") - 1)
        assert keys <= {("m", "f", "é", "0", "edges", "0.5"), ("m", "f", "éé", "1", "edges", "0.25")}


def test_merging_may_be_stopped_and_repeated(tmp_path: Path) -> None:
    """Killed between writing rows.csv and removing the parts, rows are in both."""
    store = filled(tmp_path / "a", [every()[:7], every()[7:]])
    parts = {path: path.read_bytes() for path in (tmp_path / "a").glob("rows.part-*")}
    store.merge()
    merged = (tmp_path / "a" / "rows.csv").read_bytes()
    for path, content in parts.items():
        path.write_bytes(content)
    RowStore(tmp_path / "a", ["x"]).merge()
    assert (tmp_path / "a" / "rows.csv").read_bytes() == merged
    assert not list((tmp_path / "a").glob("rows.part-*"))


def test_numbers_survive_to_six_digits(tmp_path: Path) -> None:
    values = [1 / 3, 1e-300, float("inf"), None]
    store = filled(tmp_path / "a", [[row("e", i, 0.5, value) for i, value in enumerate(values)]])
    found = [r["x"] for r in store.merge()]
    assert found == ["0.333333", "1e-300", "inf", ""]


def test_other_columns_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "a", [every()]).merge()
    with pytest.raises(ConfigError, match=r"must have the columns model, .*, y, got model, .*, x"):
        RowStore(tmp_path / "a", ["y"]).keys()
    assert len(KEY) == 6
