"""`sra estimate` and `sra doctor`, and the command line itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn import doctor, vocabulary
from sparse_ref_attn.cli import main
from sparse_ref_attn.cli.arguments import parser
from sparse_ref_attn.eval.datasets import LAYOUTS
from sparse_ref_attn.eval.embedded import SIZES
from sparse_ref_attn.eval.loading import DTYPES
from sparse_ref_attn.eval.methods import METHODS, rule_of
from sparse_ref_attn.eval.scores import MEASURES
from sparse_ref_attn.models import named_model
from sparse_ref_attn.models.registry import families
from sparse_ref_attn.ops.gather_attention.api import BACKENDS
from sparse_ref_attn.ops.verdicts import table
from sparse_ref_attn.selection.names import NAMES
from sparse_ref_attn.toy.words import TASKS as EDITS
from sparse_ref_attn.training.random_drop import DISTRIBUTIONS
from tests import programs
from tests.cli.commands import run
from tests.stand_in_backend import judged, spoiled


def test_estimate_is_that_of_the_library(models: Path) -> None:
    command = ["estimate", "--references", "2", "--size", "512x768", "--steps", "4", "--preset", "sparse-context"]
    found = json.loads(run(*command, "--model", "klein-4b", "--keep", "25%", "--json"))
    same = sra.estimate(
        named_model("klein-4b"), references=[(512, 768)] * 2, steps=4, config=sra.SparseContext(0.25)
    ).to_dict()
    assert found == json.loads(json.dumps(same))
    assert "FLOP ratio" in run(*command, "--model", models / "klein")


@pytest.mark.parametrize("preset", ["recast", "sparse-context"])
@pytest.mark.parametrize("keep", [100, 25, 10])
def test_keep_is_the_mean_over_the_steps_whatever_the_preset(preset: str, keep: int) -> None:
    """`--keep 100%` of recast was the top of its ramp: 2,177 of 4,096 tokens on average, and 16 % for 25 %."""
    command = ["estimate", "--model", "klein-4b", "--steps", "28", "--preset", preset, "--keep", f"{keep}%", "--json"]
    found = json.loads(run(*command))
    assert found["mean_tokens"] == pytest.approx(4096 * keep / 100, abs=0.5)


def test_estimate_knows_the_steps_and_the_references_of_a_model(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It had 28 steps for a four-step model, and three references for Kontext, which `run` refuses."""
    found = {name: json.loads(run("estimate", "--model", name, "--json")) for name in ("kontext", "KLEIN_4B")}
    assert [len(found[name]["kinds"]) for name in found] == [28, 4]
    assert len(json.loads(run("estimate", "--model", models / "klein_kv", "--references", "3", "--json"))["kinds"]) == 4
    for model in ("kontext", models / "kontext"):
        assert main(["estimate", "--model", str(model), "--references", "3"]) == 2
        assert "FluxKontextPipeline takes one reference image, got 3" in capsys.readouterr().err
    assert "text encoders and VAE are not in it" in run("estimate", "--model", "kontext")
    assert "published size of flux3 is not known" in run("estimate", "--model", "flux3")
    assert "is not known" not in run("estimate", "--model", "kontext")
    assert main(["estimate", "--model", "kontex"]) == 2
    assert "got kontex; did you mean 'kontext'?" in capsys.readouterr().err


def test_doctor_says_what_is_there_and_what_is_not() -> None:
    text, data = run("doctor"), json.loads(run("doctor", "--json"))
    assert f"torch            {torch.__version__}" in text
    assert "tested: 0.38 to 0.42" in text
    assert all(word in text for word in ("FluxTransformer2DModel", "Qwen-Image-Edit", "self-attention", "chunked"))
    assert data["versions"]["torch"] == torch.__version__
    assert {"sra demo", "sra run", "sra estimate", "sra compare and eval", "sra train"} <= set(data["can"])
    for name, version in doctor.versions().items():
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        assert (version or "not installed") in line
    if not torch.cuda.is_available():
        assert "no CUDA device" in data["cannot"]["run on a GPU"]


def test_doctor_names_the_packages_that_a_command_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.versions()
    monkeypatch.setattr(doctor, "versions", lambda: {**found, "peft": None, "matplotlib": None, "scipy": None})
    cannot = doctor.diagnose()["cannot"]
    wanted = "matplotlib, scipy not installed: pip install 'sparse-ref-attn[eval]'"
    assert cannot["sra compare and eval"] == wanted
    assert cannot["sra train"] == "peft not installed: pip install 'sparse-ref-attn[train]'"
    monkeypatch.setattr(doctor, "versions", lambda: {**found, "diffusers": None})
    cannot = doctor.diagnose()["cannot"]
    assert all(why.startswith("diffusers not installed") for what, why in cannot.items() if what.startswith("sra"))


def test_doctor_names_the_backend_that_auto_takes_and_why_others_cannot() -> None:
    text, data = run("doctor"), json.loads(run("doctor", "--json"))
    assert set(data["backends"]) == {
        "gather_attention", "gather_attention, query tiles", "attention_mass", "pack_rows",
    }  # fmt: skip
    for op, found in data["backends"].items():
        section = text.partition(f"  {op}\n")[2]
        assert section.startswith(f"    {found['auto']:<14} yes, auto takes it\n")
        assert found["auto"] == found["can"][0]
        assert all(f"    {name:<14} no: {why}\n" in section for name, why in found["cannot"].items())
        assert "reference" in found["can"]
    gather = data["backends"]["gather_attention"]
    assert {"auto", *gather["can"], *gather["cannot"]} == set(BACKENDS)
    if not torch.cuda.is_available():
        assert [data["backends"][op]["auto"] for op in ("gather_attention", "attention_mass", "pack_rows")] == [
            "sdpa", "chunked", "reference",
        ]  # fmt: skip
        assert data["backends"]["gather_attention"]["cannot"]["flash"] == "needs a CUDA device, got cpu"
        assert all("NVIDIA" in why for why in data["flash_packages"].values())


def into_a_closed_pipe(command: list[str]) -> int:
    """What a process of its own does."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, sys.stdout.fileno())
    with open(write, "w") as sys.stdout:  # buffered, whatever the environment says
        return main(command)


@pytest.mark.parametrize("command", [["doctor"], [], ["--help"], ["--version"], ["demo", "--help"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_traceback(command: list[str], tmp_path: Path) -> None:
    process = programs.start(into_a_closed_pipe, command, log=tmp_path / "log")
    process.join()
    assert (process.exitcode, (tmp_path / "log").read_text()) == (1, "")


def test_help_and_the_version_import_nothing_that_runs() -> None:
    asked = [[], ["--version"], ["--help"], *([name, "--help"] for name in ("demo", "run", "compare", "eval", "train"))]
    code = (
        "import contextlib, sys\n"
        "for name in ('torch', 'numpy', 'diffusers', 'PIL'): sys.modules[name] = None\n"
        "from sparse_ref_attn.cli import main\n"
        f"for arguments in {asked}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        assert main(arguments) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: sra") == len(asked) - 1
    assert f"sparse_ref_attn {sra.__version__}\n" in done.stdout


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("SELECTORS", NAMES),
        ("RULES", {rule_of(name)[0] for name in METHODS} | {"subject mask", "learned"}),
        ("BUILTIN", ("small", *SIZES)),
        ("LAYOUTS", LAYOUTS),
        ("METRICS", MEASURES),
        ("DISTRIBUTIONS", DISTRIBUTIONS),
        ("EDITS", EDITS),
        ("DTYPES", DTYPES),
        ("MODELS", [name for family in families() for name in family.published]),
    ],
)
def test_the_vocabulary_is_that_of_what_runs(name: str, known: Any) -> None:
    assert set(getattr(vocabulary, name)) == set(known)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["esitmate"], "got 'esitmate'; did you mean 'estimate'?"),
        (
            ["estimate", "--model", "kontext", "--kepe", "3"],
            "arguments must be known, got --kepe 3; did you mean '--keep'?",
        ),
        (["estimate", "--model", "kontext", "--preset", "recats"], "got 'recats'; did you mean 'recast'?"),
        (["estimate", "--model", "kontext", "--task", "subjects"], "got 'subjects'; did you mean 'subject'?"),
        (["estimate", "--model", "kontext", "--select", "edge"], "got 'edge'; did you mean 'edges'?"),
        (["eval", "--out", "x", "--rules", "Mas"], "got 'Mas'; did you mean 'mass'?"),
        (["eval", "--out", "x", "--layout", "pie bnch"], "did you mean 'pie-bench'?"),
        (["eval", "--out", "x", "--metrics", "lpip"], "did you mean 'lpips'?"),
        (["compare", "--out", "x", "--methods", "recast risin"], "did you mean 'ReCAST rising'?"),
        (["train", "--out", "x", "--steps", "1", "--keep", "half"], "must be a share or two of them (5%-100%, 0.05-1)"),
    ],
)
def test_a_near_miss_is_answered(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_names_are_the_same_everywhere_and_case_does_not_matter() -> None:
    line = parser()
    options = line.parse(["run", "i", "--model", "m", "--prompt", "p", "--out", "o", "--preset", "Sparse_Context",
                          "--task", "SUBJECT", "--rule", "Self_Attention", "--execute", "Both", "--dtype", "BFloat16",
                          "--quantize", "INT8"])  # fmt: skip
    assert (options.preset, options.task, options.select) == ("sparse-context", "subject", "self-attention")
    assert (options.execute, options.dtype, options.quantize) == ("both", "bfloat16", "int8")
    assert line.parse(["compare", "--out", "o", "--output", "64X32"]).output == (64, 32)
    options = line.parse(["eval", "--out", "o", "--rules", "mass", "TOME", "--keep", "25%", "0.1"])
    assert (options.rules, options.keep) == (["ReCAST", "ToMe"], [0.25, 0.1])
    assert line.parse(["compare", "--out", "o", "--methods", "recast_flat"]).methods == ["ReCAST flat"]
    for given, want in (("5%-100%", (0.05, 1.0)), ("0.05-1", (0.05, 1.0)), ("50%", (0.5, 0.5))):
        assert line.parse(["train", "--out", "o", "--steps", "1", "--keep", given]).keep == want
    assert sra.SparseRef("Edges", 0.25, execute="Tokens") == sra.SparseRef("edges", 0.25)
    assert sra.ReCAST(task="Subject") == sra.ReCAST(task="subject")
    with pytest.raises(sra.ConfigError, match=r"got 'gird'; did you mean 'grid'\?"):
        sra.SparseRef("gird")
    with pytest.raises(sra.ConfigError, match=r"got 'subjct'; did you mean 'subject'\?"):
        sra.SparseContext(task="subjct")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"sparse_ref_attn {sra.__version__}"


def test_doctor_verifies_every_backend_and_prints_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    usual = table.usual_kinds
    monkeypatch.setattr(table, "usual_kinds", lambda device: {kind.op: kind for kind in usual(device)[::-1]}.values())
    rows = json.loads(run("doctor", "--verify", "--json"))
    assert {row["kind"].split(",")[0] for row in rows} == {"gather_attention", "attention_mass", "pack_rows"}
    assert all(row["order"] and not row["unusable"] for row in rows)
    monkeypatch.setattr(doctor, "verify", lambda name=None: iter(rows))
    text = run("doctor", "--verify")
    for row in rows:
        section = text.partition(row["kind"] + "\n")[2]
        assert section.startswith("  ")
        assert all(f"\n  {name:<12}" in "\n" + section for name in (*row["order"], *row["unable"]))
    if not torch.cuda.is_available():
        assert "it is fixed there, so that results repeat" in text
        assert list(tmp_path.iterdir()) == []  # a CPU's times decide nothing, and nothing is kept


def test_doctor_names_an_unusable_backend_with_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = table.usual_kinds
    monkeypatch.setattr(table, "usual_kinds", lambda device: usual(device)[:1])
    with judged(tmp_path, ("stand_in", "plain")):
        spoiled["forward"] = lambda r: (r[0] * 2, r[1])
        text = run("doctor", "--verify")
    assert re.search(
        r"\n  sdpa +(alone|\d+\.\d+) +0\.\d+\n  stand_in +UNUSABLE  out: error \S+ where \S+ is allowed\n", text
    )
