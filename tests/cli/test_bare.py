"""Without the packages of the extras: what still works, and one line on how to get the rest."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparse_ref_attn import extras
from sparse_ref_attn.cli.arguments import COMMANDS
from sparse_ref_attn.toy.sprites import held_out
from tests.cli.bare import Without, main_without
from tests.eval.report_example import report
from tests.pictures import picture

EXTRAS = [module for modules in extras.MODULES.values() for module in modules]
LATER = [module for name in ("eval", "train", "app") for module in extras.MODULES[name]]
BROUGHT = [*EXTRAS, "huggingface_hub", "tokenizers", "torchao", "gguf", "cache_dit"]
NEED = {
    "demo": ["demo", "--out", "{folder}/demo"],
    "run": ["run", "{folder}/cup.png", "-p", "x", "-o", "{folder}/out.png"],
    "compare": ["compare", "--out", "{folder}/compare"],
    "evaluate": ["eval", "--out", "{folder}/eval"],
    "train": ["train", "--sprites", "{folder}", "--out", "{folder}/train", "--steps", "1"],
    "app": ["app"],
    "estimate": ["estimate", "--model", "kontext"],
}
WORK = {
    "doctor": [["doctor"], ["doctor", "--json"]],
    "build": [["build-kernels", "--help"], ["build-kernels", "--archs", "none"]],
    "bench": [["bench", "ops", "--help"], ["bench", "pipeline"]],
    "shared": [["shared", "{folder}/theirs.json"], ["shared", "{folder}/theirs.json", "--out", "{folder}/out"]],
}
LINE = re.compile(r"sra: error: sra ([\w-]+) cannot run: (.+) not installed: pip install 'sparse-ref-attn\[(\w+)\]'\n")


def needing(folder: Path) -> list[list[str]]:
    """`NEED` on a folder with one picture, which is a sprite of the training part."""
    picture(32, 32).convert("RGBA").save(folder / "cup.png")
    assert not held_out("cup")
    return [[word.format(folder=folder) for word in command] for command in NEED.values()]


def missing(ending: list[Any]) -> tuple[str, str, str]:
    """Command, packages and extra of the line that it ended with."""
    code, out, err = ending
    found = LINE.fullmatch(err)
    assert found is not None, err
    assert (code, out) == (2, "")
    return found[1], found[2], found[3]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[Any]], Path]:
    """How commands end in a bare installation, in a broken one and in one without `LATER`; the first one's folder."""
    folder, other = (tmp_path_factory.mktemp(name) for name in ("bare", "other"))
    (folder / "theirs.json").write_text(json.dumps(report()))
    works = [[word.format(folder=folder) for word in command] for commands in WORK.values() for command in commands]
    broken = needing(other)
    later = [["doctor"], *(command for command in broken if command[0] in ("compare", "train", "app"))]
    asked = Without(BROUGHT, [*needing(folder), *works]), Without(EXTRAS, broken, known=True), Without(LATER, later)
    return main_without(*asked), folder


def test_every_command_is_tried() -> None:
    assert {command.__name__.rpartition(".")[2] for command in COMMANDS} == NEED.keys() | WORK.keys()


def test_a_bare_installation_does_what_it_can_and_says_what_the_rest_needs(
    endings: tuple[list[list[Any]], Path],
) -> None:
    """`sra doctor` died with "No module named 'PIL' (unexpected ...)"."""
    (bare, *_), folder = endings
    *needs, told, data, build_help, build, bench_help, bench, table, drawn = bare
    for command, ending in zip(NEED.values(), needs, strict=True):
        assert missing(ending) == (command[0], "diffusers, transformers, pillow", "diffusers")
    assert [ending[0] for ending in (told, data, build_help, bench_help)] == [0, 0, 0, 0]
    assert "no   sra demo: diffusers, transformers, pillow not installed" in told[1]
    found = json.loads(data[1])
    assert "patch a transformer of your own (PlainAdapter)" in found["can"]
    assert found["versions"]["peft"] is None
    assert "--archs" in build_help[1]
    assert build[0] == 2
    assert "none" in build[2]
    assert "--resume" in bench_help[1]
    assert missing(bench)[0] == "bench"
    assert table[0] == 0
    assert "| cache | 3 | 2 | 2.00x |" in table[1]
    assert drawn[0] == 2
    assert "matplotlib not installed: pip install 'sparse-ref-attn[eval]'; without --out" in drawn[2]
    assert {path.name for path in folder.iterdir()} == {"cup.png", "theirs.json"}


def test_packages_that_only_seem_to_be_there_are_the_same_line(endings: tuple[list[list[Any]], Path]) -> None:
    """Metadata without modules, as a broken installation has it: the import fails in the middle of a command."""
    (_, broken, _), _ = endings
    for command, ending in zip(NEED.values(), broken, strict=True):
        name, packages, extra = missing(ending)
        assert name == command[0]
        assert packages in {extras.DISTRIBUTIONS.get(module, module) for module in extras.MODULES[extra]}


def test_pipelines_alone_are_enough_for_the_command_line(endings: tuple[list[list[Any]], Path]) -> None:
    (_, _, (told, *needs)), _ = endings
    assert told[0] == 0
    assert [missing(ending) for ending in needs] == [
        ("compare", "matplotlib, scikit-image, scipy", "eval"), ("train", "peft", "train"), ("app", "gradio", "app"),
    ]  # fmt: skip


@pytest.mark.parametrize("extra", sorted(extras.MODULES))
def test_the_modules_are_those_of_the_extras(extra: str) -> None:
    needs = [
        need for need in importlib.metadata.requires("sparse-ref-attn") if re.search(f"extra == .{extra}\\b", need)
    ]
    brought = {re.match(r"[\w-]+", need)[0] for need in needs} - {"sparse-ref-attn"}
    told = [extras.DISTRIBUTIONS.get(module, module) for module in extras.MODULES[extra]]
    elsewhere = {extras.DISTRIBUTIONS.get(module, module) for module in EXTRAS} - set(told)
    assert brought - elsewhere == set(told)
    assert set(extras.EXTRAS[extra]) <= brought
