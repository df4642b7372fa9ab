"""What a user gets: a lean import, names that resolve, one version, the files a package must carry."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

import sparse_ref_attn as sra

ROOT = Path(__file__).parents[1]
HEAVY = [
    "PIL",
    "accelerate",
    "diffusers",
    "peft",
    "skimage",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "triton",
]


def loaded_by(*statements: str) -> list[dict[str, object]]:
    """Run `statements` in a fresh interpreter; after each, which heavy modules there are, and whether CUDA is."""
    code = f"""
import json, sys
found = []
for statement in {statements!r}:
    exec(statement)
    torch = sys.modules.get("torch")
    found.append({{
        "heavy": [name for name in {HEAVY!r} if name in sys.modules],
        "cuda": torch is not None and torch.cuda.is_initialized(),
    }})
print(json.dumps(found))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(run.stdout.splitlines()[-1])


def test_import_is_lean() -> None:
    """No public name loads diffusers or kernels, nor do costs, the models' stream maps and the door of the ops."""
    lean, bare, every, costs, door = loaded_by(
        "import sparse_ref_attn as sra",
        "import torch",
        "for name in sra.__all__: getattr(sra, name)",
        "import sparse_ref_attn.cost, sparse_ref_attn.schedules, sparse_ref_attn.models",
        "import sparse_ref_attn.functional",
    )
    assert lean == {"heavy": [], "cuda": False}
    assert every == bare
    assert costs == bare
    assert door == bare


def test_public_names_resolve_and_are_listed() -> None:
    assert set(sra.__all__) <= set(dir(sra))
    for name in sra.__all__:
        value = getattr(sra, name)
        assert value is not None
        assert getattr(value, "__name__", name).rpartition(".")[2] == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'sparse_ref_attn' has no attribute 'pach'"):
        sra.pach  # noqa: B018


def test_one_version() -> None:
    assert importlib.metadata.version("sparse-ref-attn") == sra.__version__
    assert not re.search(r"^version\s*=\s*[\"']", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_both_commands_are_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", value="sparse_ref_attn.cli:main")
    assert {script.name for script in scripts} == {"sra", "sparse-ref-attn"}


def test_core_needs_no_more_than_four_packages() -> None:
    needs = importlib.metadata.requires("sparse-ref-attn")
    core = {re.match(r"[\w-]+", need).group() for need in needs if "extra ==" not in need}
    assert core == {"torch", "triton", "numpy", "einops"}


def test_constraints_pin_every_direct_requirement() -> None:
    """An open torch would bring several GB of CUDA builds; an open diffusers another model code."""
    pins = set(re.findall(r"^([\w-]+)==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    needs = importlib.metadata.requires("sparse-ref-attn")
    names = {re.match(r"[\w-]+", need).group() for need in needs}
    assert names - pins == {"flash-attn", "sparse-ref-attn"}  # flash-attn needs a card to build; the other is us


def test_the_changelog_has_this_version_and_is_in_the_sdist() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert sra.__version__ in headings
    assert "include CHANGELOG.md" in (ROOT / "MANIFEST.in").read_text().splitlines()


def test_the_python_versions_are_of_the_matrix() -> None:
    stated = importlib.metadata.metadata("sparse-ref-attn").get_all("Classifier")
    named = {
        found[1] for line in stated if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))
    }
    assert named
    assert named <= set(re.findall(r"\b(3\.\d+)/0\.", (ROOT / ".ci" / "matrix").read_text()))


def test_photo_and_its_notice_are_package_data() -> None:
    assets = importlib.resources.files("sparse_ref_attn") / "assets"
    with PIL.Image.open(assets / "photo.jpg") as photo:
        assert photo.size == (512, 512)
    assert "CC0" in (assets / "NOTICE.md").read_text()
    assert (importlib.resources.files("sparse_ref_attn") / "py.typed").is_file()


def test_licence_is_apache_in_full() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert importlib.metadata.metadata("sparse-ref-attn")["License-Expression"] == "Apache-2.0"


def test_weights_do_not_say_where_they_lay() -> None:
    """diffusers writes the folder that a model was loaded from into its configuration."""
    configs = [
        path
        for folder in ("benchmarks/weights", "sparse_ref_attn/assets")
        for path in (ROOT / folder).rglob("config.json")
    ]
    assert len(configs) >= 5
    assert [path for path in configs if "_name_or_path" in json.loads(path.read_text())] == []
