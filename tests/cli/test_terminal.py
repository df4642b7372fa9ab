"""What a person sees in a terminal is aligned, and no wider than it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparse_ref_attn.cli import main
from sparse_ref_attn.cli.terminal import fitted
from tests.cli.commands import TINY, run
from tests.eval.drawing import compare_pixels

TABLE = "| method | tokens |\n|---|--:|\n| dense | 4,096 |\n| edges | 9 |"


def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))


def bars(error: str) -> list[str]:
    """The last state of each line that a progress bar drew."""
    return [line.split("\r")[-1] for line in error.split("\n") if "it/s]" in line]


def test_a_markdown_table_becomes_columns() -> None:
    assert fitted(f"before\n{TABLE}\nafter", 80).splitlines() == [
        "before",
        "method  tokens",
        "------  ------",
        "dense    4,096",
        "edges        9",
        "after",
    ]


def test_rows_are_cut_and_values_go_on_below_themselves() -> None:
    assert fitted(TABLE, 10).splitlines()[2] == "dense    …"
    assert fitted("a   1   2   3", 9) == "a   1   …"
    assert fitted("name   a value of many words", 16).splitlines() == [
        "name   a value",
        "       of many",
        "       words",
    ]
    assert fitted("short", 16) == "short"


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("command", [["estimate", "--model", "kontext"], ["doctor"]])
def test_no_line_is_wider_than_the_terminal(
    command: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(monkeypatch, columns)
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert max(map(len, lines)) > columns - 15


def test_a_pipe_gets_all_of_it() -> None:
    assert max(map(len, run("estimate", "--model", "kontext").splitlines())) > 120


def test_compare_is_one_progress_line_and_an_aligned_table_and_ends_with_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(monkeypatch, 70)
    compare_pixels(monkeypatch)
    command = ["compare", *TINY[1:], "--keep", "60%", "--methods", "edges", "grid", "ToMe", "--from-block", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    bar, *fewer_steps = bars(said.err)
    assert len(fewer_steps) < 2
    assert "11/11" in bar  # 1 dense and 2 of each in the warm-up, then 2 of dense, edges and grid; ToMe never runs
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 70
    head = next(i for i, line in enumerate(lines) if line.startswith("method"))
    rows = {line.split("  ")[0] for line in lines[head + 2 : head + 6]}
    assert {"dense", "edges", "grid"} <= rows  # and "1 step", where it takes no longer than one of them
    assert "Written to" in said.out
    assert lines[-1].split() == ["pictures/", "each", "picture", "of", "the", "page", "by", "itself"]


def test_demo_ends_with_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    files = [line.split()[0] for line in lines[lines.index(f"Written to {tmp_path}") + 1 :]]
    assert [name for name in files if name != "fewer"] == ["dense.png", "sparse.png", "kept.png", "report.json"]
    assert ("fewer" in files) == (tmp_path / "fewer steps.png").exists()
    assert 1 <= len(bars(said.err)) <= 2  # fewer steps have their own, where any take no longer
    assert "0it [" not in said.err
