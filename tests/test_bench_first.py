"""The ten minutes on a card, with stand-ins for the card and its programs: no part hurts another, lines stay."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import first, first_checks, first_times, results
from benchmarks.cli import main
from benchmarks.first import CHECKS, Check, install, run_all
from benchmarks.first_checks import gathers, outputs
from benchmarks.lines import Lines, read
from benchmarks.op_calls import Attention
from benchmarks.op_shapes import OpShape
from benchmarks.runner import LATE

ROOT = Path(first.__file__).resolve().parents[1]
SMALL = OpShape("small", heads=2, channels=32, text=8, image=56)
CPU = torch.device("cpu")


def options(out: Path, minutes: float = 10.0) -> argparse.Namespace:
    return argparse.Namespace(out=out, cut=True, minutes=minutes, wheels=None)


def module(folder: Path, name: str, code: str) -> tuple[str, ...]:
    (folder / f"{name}.py").write_text(code)
    return (name,)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_part_that_fails_or_hangs_takes_nothing_from_the_others(modules: Path, monkeypatch: pytest.MonkeyPatch):
    writes = "import sys; open(sys.argv[sys.argv.index('--lines') + 1], 'a').write('{\"known\": %d}\\n'); "
    checks = (
        Check("breaks", 5, module(modules, "breaks", writes % 1 + "raise SystemExit(3)")),
        Check("hangs", 3, module(modules, "hangs", writes % 2 + "sys.stdout.flush(); import time; time.sleep(600)")),
        Check("not here", 1, ("platform",), under=("no-such-program",)),
        Check("no module", 1, ("platform",), needs=("no_such_module",)),
        Check("told", 1, module(modules, "told", "raise SystemExit(2)"), optional=True),
        Check("works", 400, module(modules, "works", writes % 3)),
    )
    monkeypatch.setattr(first, "CHECKS", checks)
    monkeypatch.setattr(first, "NEEDED", ())
    began = time.monotonic()
    assert run_all(options(modules / "out", minutes=0.3)) == 1
    assert time.monotonic() - began < 600  # what hangs sleeps that long
    found = read(modules / "out" / "card.jsonl")
    assert [line["known"] for line in found if "known" in line] == [1, 2, 3]
    ends = {line["part"]: line for line in found if "part" in line}
    assert [ends[name].get("exit_code") for name in ("breaks", "hangs", "told", "works")] == [3, LATE, 2, 0]
    assert ends["not here"]["skipped"] == "no-such-program must be installed, and is not"
    assert ends["no module"]["skipped"] == "no_such_module must be installed, and is not"
    assert ends["all"]["failed"] == ["breaks", "hangs"]


def test_the_shares_are_ten_minutes():
    assert sum(check.seconds for check in CHECKS) <= 600
    assert {check.name for check in CHECKS} >= {"outputs", "tests", "times", "memcheck", "racecheck", "tensor pipe"}
    assert ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1") in next(c for c in CHECKS if c.name == "memcheck").environment


@pytest.mark.parametrize(
    ("check", "line", "said"),
    [
        ("tests", "[gw1] [ 92%] FAILED tests/gpu/test_mass_rows.py::test_mass[1-triton] ",
         {"test": "tests/gpu/test_mass_rows.py::test_mass[1-triton]", "ok": False}),
        ("tests", "tests/gpu/test_mass_rows.py::test_mass FAILED      [ 3%]",
         {"test": "tests/gpu/test_mass_rows.py::test_mass", "ok": False}),
        ("tests", "FAILED tests/gpu/test_mass_rows.py::test_mass - assert", None),
        ("tests", "==== 2 failed, 250 passed, 1 skipped in 91.02s ====", {"failed": 2, "passed": 250, "skipped": 1}),
        ("memcheck", "========= ERROR SUMMARY: 3 errors", {"errors": 3, "ok": False}),
        ("memcheck", "========= Invalid __global__ read of size 16 bytes",
         {"fault": "Invalid __global__ read of size 16 bytes"}),
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
         {"errors": 0, "ok": True}),
        ("tensor pipe", '"0","7","python","host","_forward","1","7","(256, 1, 1)","(36, 24, 1)","0","9.0",'
         '"Command line profiler metrics","sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active","%",'
         '"61.2"',
         {"kernel": "_forward", "percent": "61.2",
          "metric": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active"}),
        ("tensor pipe", "==ERROR== ERR_NVGPUCTRPERM - no permission", {"skipped": "ERR_NVGPUCTRPERM - no permission"}),
    ],
)  # fmt: skip
def test_what_programs_print_becomes_lines(check: str, line: str, said: dict[str, object] | None):
    assert next(c for c in CHECKS if c.name == check).reads(line) == said


def test_a_line_that_a_killed_process_left_incomplete_is_passed_over(tmp_path: Path):
    Lines(tmp_path / "l", device="none").add(ms=1.5)
    with (tmp_path / "l").open("a") as file:
        file.write('{"ms": 2.')
    assert read(tmp_path / "l") == [{"device": "none", "ms": 1.5}]


def test_what_is_missing_comes_from_the_folder_of_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheels, name = tmp_path / "wheels", "made_up_for_a_test"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / f"{name}-1-py3-none-any.whl", "w") as wheel:
        info = f"{name}-1.dist-info"
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    monkeypatch.setattr(first, "NEEDED", ("another_made_up", name, "sys"))
    (told,) = install(wheels, tmp_path / "site")
    assert told.startswith("another_made_up: ")
    assert (tmp_path / "site" / f"{name}.py").exists()
    assert len(install(None, tmp_path / "other")) == 2


def test_outputs_are_compared_in_full_and_a_planted_error_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_checks, "OWN", ("sdpa",))
    assert outputs(Lines(tmp_path / "right"), CPU, torch.float16, SMALL, repeats=2) == 0
    found = read(tmp_path / "right")
    assert [line["tensor"] for line in found] == ["out", "q", "k", "v", "k_ref", "v_ref"]
    assert all(line["ok"] and line["same_bits"] == 2 for line in found)
    right = Attention.ours

    def wrong_at_the_end(call: Attention, backend: str) -> torch.Tensor:
        out = right(call, backend).clone()
        out[:, -1, -1, -1] += 0.1  # the last element alone
        return out

    monkeypatch.setattr(Attention, "ours", wrong_at_the_end)
    assert outputs(Lines(tmp_path / "wrong"), CPU, torch.float16, SMALL, repeats=2) == 1
    assert [line["tensor"] for line in read(tmp_path / "wrong") if not line["ok"]] == ["out"]


def test_bits_that_differ_between_repeats_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_checks, "OWN", ("sdpa",))
    right, calls = Attention.ours, []

    def now_and_then(call: Attention, backend: str) -> torch.Tensor:
        calls.append(backend)
        return right(call, backend) * (1 + 1e-3 * (len(calls) == 3))

    monkeypatch.setattr(Attention, "ours", now_and_then)
    assert outputs(Lines(tmp_path / "l"), CPU, torch.float16, SMALL, repeats=3) == 1
    assert read(tmp_path / "l")[0]["same_bits"] == 2


def test_cases_that_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_checks, "OWN", ("reference", "no-such-backend"))
    assert gathers(Lines(tmp_path / "l"), CPU, torch.float32) == 0
    found = read(tmp_path / "l")
    assert [line.get("ok") for line in found] == [True] * 5 + [None] * 5
    assert all("backend must be one of" in line["skipped"] for line in found[5:])


def test_a_kernel_whose_result_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_times, "OWN", ())
    monkeypatch.setattr(first_times, "ROWS", {"gather_attention": lambda call: iter([
        ("ours (triton)", lambda: first_times.Timed(lambda: None, 1.0, gate=lambda: "error 1, allowed 0")),
        ("raises", lambda: first_times.Timed(lambda: [][0] if call is None else torch.ones(2) @ torch.ones(3), 1.0)),
        ("another", lambda: first_times.Timed(lambda: None, 1e6)),
    ])})  # fmt: skip
    assert first_times.times(Lines(tmp_path / "l"), CPU, torch.float32, SMALL, rounds=3) == 1
    wrong, raises, another = read(tmp_path / "l")[-3:]
    assert wrong["skipped"] == "error 1, allowed 0"
    assert "size" in raises["skipped"]
    assert another["ms_min"] <= another["ms"] <= another["ms_max"]
    assert not another["graph"]


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"diffusers", "transformers", "accelerate", "peft", "safetensors", "PIL", "einops"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without diffusers and what comes with it, and without pytest's plugins."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BLOCKED)
    paths = os.pathsep.join([str(tmp_path / "bare"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


OPS = ["ops", "--quick", "--kept", "0.25", "--rounds", "1", "--heads", "1", "--tiles", "4"]


def test_nothing_needs_diffusers_but_whole_pipelines(tmp_path: Path, bare: dict[str, str]):
    """The ops are timed, what the card's parts import is imported and their tests are collected."""
    tests = next(check for check in CHECKS if check.name == "tests").command
    imported = [f"-pbenchmarks.{name}" for name in ("card", "first_child", "first_checks", "first_times")]
    out = tmp_path / "ops_cpu.csv"
    code = f"""
import pytest
from benchmarks.cli import main
from sparse_ref_attn.errors import ConfigError
assert main({[*OPS, "--out", str(out)]!r}) == 0
try:
    main(["pipeline"])
except ConfigError as error:
    print(error)
raise SystemExit(pytest.main({[*tests[1:], "--collect-only", *imported]!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=bare, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pipeline needs the package diffusers, which is not installed" in done.stdout
    assert {row["method"] for row in results.read(out)} >= {"dense", "index_select + sdpa", "ours (auto)"}
    assert int(re.search(r"(\d+) tests collected", done.stdout)[1]) >= 253


def program(path: Path, code: str) -> None:
    path.write_text(f"#!{sys.executable}\nimport subprocess, sys\n{code}\n")
    path.chmod(0o755)


SANITIZER = """
words = sys.argv[sys.argv.index("--tool") + 2:]
code = subprocess.run(words).returncode
print("========= ERROR SUMMARY: 0 errors" if "memcheck" in sys.argv else "========= RACECHECK SUMMARY: 1 hazard")
sys.exit(code if "memcheck" in sys.argv else 1)
"""
NCU = "print('==ERROR== ERR_NVGPUCTRPERM'); sys.exit(1)"


@pytest.mark.slow
def test_all_of_it_on_a_stand_in_device(tmp_path: Path, bare: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "compute-sanitizer", SANITIZER)
    program(tmp_path / "bin" / "ncu", NCU)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", bare["PYTHONPATH"])
    assert main(["card", "--cut", "--out", str(tmp_path / "out"), "--minutes", "30"]) == 1
    found = read(tmp_path / "out" / "card.jsonl")
    ends = {line["part"]: line["exit_code"] for line in found if "exit_code" in line}
    assert ends == {
        "environment": 0, "outputs": 0, "tests": 0, "times": 0, "memcheck": 0, "racecheck": 1, "tensor pipe": 1,
    }  # fmt: skip
    assert found[-1]["failed"] == ["racecheck"]
    ours = [line for line in found if line.get("backend") == "triton" and line["part"] != "environment"]
    assert {line["part"] for line in ours} == {"outputs", "memcheck", "racecheck"}
    assert all(line["ok"] for line in ours)
    timed = {line["row"] for line in found if line.get("method", "").startswith("ours (triton)") and "ms" in line}
    assert timed == set(first_times.ROWS)
    assert {line["row"] for line in found if "row" in line} == {*first_times.ROWS, *first_times.NOT_HERE}
    json.dumps(found)
