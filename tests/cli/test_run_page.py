"""What docs/run.md says of `sra run` is so."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.cli.arguments import parser
from sparse_ref_attn.cli.edits import edits_of
from tests.cli.commands import run
from tests.pictures import picture

PAGE = (Path(__file__).parents[2] / "docs" / "run.md").read_text("utf-8")


def fields(heading: str) -> set[str]:
    """What stands as code in the first column of the first table under a heading."""
    table = PAGE.partition(f"## {heading}\n")[2].partition("\n| ")[2].partition("\n\n")[0]
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def told(tmp_path: Path, *more: str) -> dict[str, Any]:
    picture(32, 32).save(tmp_path / "a.png")
    command = ("run", tmp_path / "a.png", "-p", "x", "-o", tmp_path / "o.png", "--steps", "1", "--json", *more)
    found: dict[str, Any] = json.loads(run(*command))
    return found


def test_the_json_has_the_fields_of_the_page(tmp_path: Path) -> None:
    found = told(tmp_path, "--compare-dense")
    assert set(found) == fields("`--json`")
    assert set(found["dense"]) == {"picture", "seconds", "speedup"}
    assert set(found["reference_tokens"]) == {"all", "mean_per_step", "share"}
    assert isinstance(sra.SparseRef.from_dict(found["config"]), sra.SparseRef)


def test_a_failure_has_the_fields_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparse_ref_attn.cli.session import Session

    def fail(self: Session, edit: Any, pictures: Any) -> None:
        raise sra.LayoutError("no such layout")

    monkeypatch.setattr(Session, "make", fail)
    picture(32, 32).save(tmp_path / "a.png")
    assert main(["run", str(tmp_path / "a.png"), "-p", "x", "-o", str(tmp_path / "o.png"), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    last = PAGE.partition("Of a picture that failed")[2]
    assert set(found) == set(re.findall(r"`(\w+)`", last.partition("of its kind")[0]))
    assert (found["status"], found["code"], found["error"]) == ("failed", 2, "no such layout")


def test_the_lines_of_the_page_are_edits(tmp_path: Path) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "edits.jsonl").write_text(example)
    for name in ("photo", "cup", "table"):
        picture(32, 32).save(tmp_path / f"{name}.jpg")
    options = parser().parse(["run", str(tmp_path / "edits.jsonl"), "-o", str(tmp_path / "out")])
    edits, many = edits_of(options)
    assert many
    assert [edit.out.name for edit in edits] == ["0001-photo.png", "table-1.jpg", "table-2.jpg"]
    (tmp_path / "edits.jsonl").write_text('{"none": 1}')
    with pytest.raises(sra.ConfigError, match="must have the fields") as error:
        edits_of(options)
    known = re.search(r"fields (.*), got", str(error.value))
    assert known is not None
    assert set(known[1].split(", ")) == fields("Many edits")


def test_every_command_of_the_page_is_known() -> None:
    shown = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(shown) == 4
    for line in shown:
        assert parser().parse(shlex.split(line)[1:]).model == "PATH"


def test_help_is_readable_at_80_columns_and_names_what_the_page_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parser().parse(["run", "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--help"} <= set(re.findall(r"--[a-z][a-z-]+", said))
