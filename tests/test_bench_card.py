"""The parts for a card: each runs at cut size on a CPU, stops in time, keeps its rows and is not run twice."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import card, results
from benchmarks.card import PARTS, Part
from benchmarks.cli import LEVELS, main
from benchmarks.runner import LATE, MISSING, carry_out
from benchmarks.shapes import SUITES
from sparse_ref_attn import ConfigError


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_part(monkeypatch: pytest.MonkeyPatch, out: Path, *parts: Part, asked: str = "next", minutes: str = "5") -> int:
    monkeypatch.setattr(card, "PARTS", parts)
    return main(["card", "--part", asked, "--cut", "--out", str(out), "--minutes", minutes])


def part_of(*modules: str) -> Part:
    commands = tuple((module,) for module in modules)
    return Part("a part", commands, commands)


def test_the_parts_cover_everything():
    commands = [command for part in PARTS for command in part.commands]
    assert PARTS[0].commands[0][:3] == ("pytest", "-m", "gpu")
    assert PARTS[1].under[0] == "compute-sanitizer"
    levels = {command[1] for command in commands if command[0] == "benchmarks"}
    assert levels == set(LEVELS) - {"check", "card", "configurations"}
    suites = {command[command.index("--suite") + 1] for command in commands if "--suite" in command}
    assert suites == set(SUITES) - {"pipeline", "cache", "geometries"}
    ends = {c for c in commands if "end-to-end" in c}
    cases = SUITES["end-to-end"].cases
    assert len(ends) == len(cases)


@pytest.mark.parametrize("number", range(len(PARTS)))
def test_a_part_asks_for_what_its_level_takes(number: int):
    """The commands parse, the rows of a cut run go to files of their own, and a killed part can go on."""
    part, out = PARTS[number], Path("/somewhere")
    for cut in (False, True):
        for line in part.lines(out, cut):
            module = line[line.index("-m") + 1 :]
            if module[0] != "benchmarks":
                continue
            with pytest.raises(SystemExit) as left:
                main([*module[1:], "--help"])
            assert left.value.code == 0
            if "--out" in line and "plots" not in line:
                assert "--resume" in line
                assert line[line.index("--out") + 1].endswith("_cpu.csv" if cut else "_cuda.csv")
    assert len(part.commands) == len(part.cut)


def test_a_part_that_runs_out_of_time_is_stopped_with_all_it_started(tmp_path: Path):
    began = time.monotonic()
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])"
    with (tmp_path / "log").open("w") as log:
        assert carry_out([python(child), python("print('never')")], 3.0, log) == LATE
    told = (tmp_path / "log").read_text()
    assert "stopped after 3 s; rows of finished cases are written" in told
    assert "\nnever" not in told
    assert time.monotonic() - began < 600  # what the child sleeps


def test_a_command_that_fails_ends_the_part(tmp_path: Path):
    with (tmp_path / "log").open("w") as log:
        assert carry_out([python("raise SystemExit(3)"), python("print('never')")], 600.0, log) == 3
        assert carry_out([["no-such-program"]], 600.0, log) == MISSING
    told = (tmp_path / "log").read_text()
    assert "exit code 3" in told
    assert "no-such-program must be installed for this part, and is not on the PATH" in told
    assert "\nnever" not in told


def test_the_next_part_is_the_first_that_is_not_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    good, bad = part_of("platform"), part_of("no_such_module_of_python")
    assert run_part(monkeypatch, tmp_path, good, bad) == 0
    assert run_part(monkeypatch, tmp_path, good, bad) != 0
    assert [row["part"] for row in results.read(tmp_path / "parts.csv")] == ["0", "1"]
    assert "No module named no_such_module_of_python" in (tmp_path / "part_1.log").read_text()
    assert run_part(monkeypatch, tmp_path, good, good) == 0
    assert run_part(monkeypatch, tmp_path, good, good) == 0
    assert "all 2 parts are done" in capsys.readouterr().out
    assert len(results.read(tmp_path / "parts.csv")) == 3


def test_bad_input(tmp_path: Path):
    with pytest.raises(ConfigError, match="number from 0 to"):
        main(["card", "--part", "99", "--cut", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="--out must name a folder other than benchmarks/results"):
        main(["card", "--part", "0", "--cut"])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs a CUDA device, got none"):
            main(["card", "--part", "0", "--out", str(tmp_path)])


@pytest.mark.slow
def test_the_list_says_how_long(capsys: pytest.CaptureFixture):
    assert main(["card", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PARTS)
    assert all(" min " in line for line in lines)
    planned = [part.minutes() for part in PARTS]
    assert all(minutes is None or 0 < minutes < 8 for minutes in planned)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PARTS)))
def test_every_part_runs_at_cut_size(number: int, tmp_path: Path):
    if any("plots" in command for command in PARTS[number].cut):
        shutil.copy(results.RESULTS / "pipeline_cpu.csv", tmp_path)
    assert main(["card", "--part", str(number), "--cut", "--out", str(tmp_path), "--minutes", "30"]) == 0
    (row,) = results.read(tmp_path / "parts.csv")
    assert (row["part"], row["exit_code"]) == (str(number), "0")
    if any(command[0] == "benchmarks" and "plots" not in command for command in PARTS[number].cut):
        (path,) = (path for path in tmp_path.glob("*_cpu.csv") if path.name != "parts.csv")
        assert results.read(path)
