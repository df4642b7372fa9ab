"""A model family is one file and one line: nothing else knows of it, and nothing else is needed for a new one."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.models.registry import families
from sparse_ref_attn.vocabulary import FAMILIES, MODELS
from tests import programs

PACKAGE, TESTS = Path(sra.__path__[0]), Path(__file__).parents[1]
OWN = PACKAGE / "models"
START = "FAMILIES: dict[str, tuple[str, ...]] = {\n"
OLD, NEW = '    "longcat": ("longcat-image-edit",),\n', '    "fresh": ("fresh-model",),\n'
BUILT = {"toy/pipeline.py", "eval/embedded.py"}  # the small pipelines
DRAWN = {"eval/work.py", "eval/settings.py", "eval/frontier/listed.py", "eval/frontier/figure.py"}  # whose work is told


def own(path: Path) -> str | None:
    """The family whose file it is."""
    name = path.relative_to(OWN).parts[0].removesuffix(".py") if OWN in path.parents else None
    return name if name in FAMILIES else None


@cache
def modules() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text("utf-8"))) for path in sorted(PACKAGE.rglob("*.py"))]


def imported(path: Path, tree: ast.Module) -> Iterator[str]:
    """Full names of what a file imports."""
    package = ("sparse_ref_attn", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def named(tree: ast.Module) -> set[str]:
    """Identifiers and whole texts of a file's code."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_no_file_imports_a_family() -> None:
    """`models` loads them by the lines of `vocabulary.FAMILIES`; a family may import its own files."""
    wrong = [
        (path.relative_to(PACKAGE), name)
        for path, tree in modules()
        for name in imported(path, tree)
        for family in FAMILIES
        if f"{name}.".startswith(f"sparse_ref_attn.models.{family}.") and own(path) != family
    ]
    assert wrong == []


def test_what_is_known_of_a_family_stands_in_its_file_alone() -> None:
    names = {
        name.rpartition(".")[2]: family.name
        for family in families()
        for name in (*family.classes, *family.processors, *(facts.cls for facts in family.pipelines))
    }
    assert len(names) >= 12
    elsewhere = {
        str(path.relative_to(PACKAGE)): found
        for path, tree in modules()
        if own(path) is None and (found := named(tree) & {*names, *MODELS})
    }
    assert elsewhere.pop("vocabulary.py") == set(MODELS)
    assert set(elsewhere) <= BUILT | DRAWN


def test_the_lines_name_the_models_that_the_files_describe() -> None:
    described = {tuple(family.published) for family in families() if family.published}
    assert described == set(FAMILIES.values())
    files = {path.stem for path in OWN.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert files == {*FAMILIES, "__init__", "codebases", "flux_ip", "named_models", "pipelines", "refused", "registry"}


def new_family(folder: str) -> None:
    """A target: `new_family.py` with the copy of the package that is in `folder`, its operators anew."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("sparse_ref_attn", "tests"):
            for library in {each for each in vars(module).values() if isinstance(each, torch.library.Library)}:
                library._destroy()
            del sys.modules[name]
    sys.path.insert(0, folder)
    os.chdir(folder)
    programs.script(str(Path(__file__).with_name("new_family.py")), folder)


@pytest.mark.timeout(900)
def test_one_file_and_one_line_make_a_new_family(tmp_path: Path) -> None:
    """A family is taken out, and put back under other names: patched, estimated, batched, evaluated and trained."""
    package = tmp_path / PACKAGE.name
    package.mkdir()
    for entry in PACKAGE.iterdir():
        if entry.name not in ("models", "vocabulary.py", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    shutil.copytree(OWN, package / "models", ignore=shutil.ignore_patterns("__pycache__"))
    file = package / "models" / "longcat.py"
    text = file.read_text("utf-8").replace("longcat-image-edit", "fresh-model")
    file.unlink()
    file.with_name("fresh.py").write_text(text)
    text = (PACKAGE / "vocabulary.py").read_text("utf-8")
    assert OLD in text
    (package / "vocabulary.py").write_text(text.replace(OLD, "").replace(START, START + NEW))
    told = programs.run(new_family, str(tmp_path), log=tmp_path / "log")
    assert told.endswith("done\n")
    assert "LongCatImageEditPipeline takes one reference image, got 2" in told
