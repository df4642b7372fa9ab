"""The public names as a type checker sees them, and as the documentation writes them."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sparse_ref_attn as sra

ROOT = Path(__file__).resolve().parents[1]
MODULES = {module.name for module in pkgutil.iter_modules(sra.__path__)}
PUBLIC_MODULES = {"config", "errors", "functional", "schedules", "selection"}

# A user's script; what follows ## is a part of mypy's error there, and no other line has one.
SCRIPT = """\
import sparse_ref_attn as sra
from sparse_ref_attn import pach ## has no attribute "pach"

sra.patch(1, frobnicate=3) ## Unexpected keyword argument "frobnicate" for "patch"
sra.patch(1, [0.25]) ## incompatible type "list[float]"; expected "SparseRef | float | str | None"
sra.not_there ## Module has no attribute "not_there"
sra.import_module ## Module has no attribute "import_module"
sra.cli ## Module has no attribute "cli"
sra.errors.ConfigEror ## Module has no attribute "ConfigEror"
sra.functional.not_there ## Module has no attribute "not_there"
sra.SparseRef(buget=0.25) ## Unexpected keyword argument "buget" for "SparseRef"
sra.Cosine(low=0.1) ## Unexpected keyword argument "low" for "Cosine"
sra.schedules.Cosine(sign="near") ## Unexpected keyword argument "sign" for "Cosine"
sra.patch(1).summary("dict").title() ## "dict[str, Any]" has no attribute "title"
sra.batch(1, ["a cup"], [[2]]).pictures ## "BatchResult" has no attribute "pictures"
sra.plan("kontext", "2") ## Argument 2 to "plan" has incompatible type "str"; expected "float"
sra.estimate(1, config=[1]) ## Argument "config" to "estimate" has incompatible type "list[int]"

handle: sra.PatchHandle = sra.patch(1, sra.SparseContext(0.25, "edges"))
guarded: sra.SparseRef = sra.SparseRef("mass", sra.schedules.Cosine(0.1, 0.5), guard=sra.config.UniformGuard())
score: sra.selection.Selector = sra.Cosine()
attend = sra.functional.gather_attention
text: str = sra.patch(1).summary() + sra.plan(1, 2.5).summary() + sra.__version__
with sra.patched(1, sra.ReCAST()) as entered:
    entered.remove()
try:
    handle.remove()
except (sra.ConfigError, sra.errors.SparseRefError):
    pass
"""

# Whatever comes from the rest is Any, so that a public type which needed one of its parts would be found out.
READ = ("torch", "torch._tensor", "torch.types", "torch.nn", "torch.nn.modules", "torch.nn.modules.module")
CONFIG = f"""\
[mypy]
strict = true
[mypy-matplotlib.*,torch.*]
follow_imports = skip
[mypy-{",".join(READ)}]
follow_imports = normal
"""


def mypy(script: Path, cache: Path) -> list[str]:
    """What ``mypy --strict`` prints of a script that stands apart from the package, so that ``py.typed`` is needed."""
    script.with_name("mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(cache), script.name]
    environment = {**os.environ, "PYTHONPATH": str(Path(sra.__path__[0]).parent)}
    run = subprocess.run(
        command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return run.stdout.splitlines()


@pytest.mark.early
def test_a_type_checker_knows_every_public_name(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """One run for both halves: mypy reads what it needs of torch, once, into pytest's own cache."""
    lines = SCRIPT.splitlines()
    names = [name for name in sra.__all__ if name not in PUBLIC_MODULES]
    script = tmp_path / "script.py"
    script.write_text("\n".join([*lines, *(f"reveal_type(sra.{name})" for name in names)]) + "\n")
    said: dict[int, str] = {}
    for line in mypy(script, pytestconfig.cache.mkdir("mypy")):
        number, kind, message = re.fullmatch(r"script\.py:(\d+): (error|note): (.*)", line).groups()
        if kind == "error" or message.startswith("Revealed type"):
            assert int(number) not in said, line
            said[int(number)] = message

    refused = {number: line.split(" ## ")[1] for number, line in enumerate(lines, 1) if " ## " in line}
    assert {number for number in said if number <= len(lines)} == set(refused)
    for number, message in refused.items():
        assert message in said[number], f"{lines[number - 1]}: {said[number]}"

    types = [re.fullmatch(r'Revealed type is "(.*)"', said[len(lines) + 1 + i]).group(1) for i in range(len(names))]
    assert "Any" not in types
    # Any stands where any library's pipeline or mask may, and where arguments go on to another call.
    free = {argument for type_ in types for argument in re.findall(r"(\w+): Any\b", type_)}
    assert free == {"pipe", "transformer", "mask", "arguments", "settings"}


def test_public_names_alone_are_listed() -> None:
    import sparse_ref_attn.cli  # noqa: F401 -- Python makes it an attribute, which is no public name

    listed = [name for name in dir(sra) if not re.fullmatch(r"__\w+__", name)]
    assert set(listed) == set(sra.__all__) - {"__version__"}
    assert {"patch", "SparseRef", "UniformGuard", "cli", "import_module"} & set(listed) == {"patch", "SparseRef"}


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """Importing ``sparse_ref_attn.batch`` would make ``sra.batch`` that module, for everybody in the process."""
    assert MODULES & set(sra.__all__) == PUBLIC_MODULES


def documentation() -> str:
    patterns = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "csrc/**/*", "examples/*.py", "sparse_ref_attn/**/*.py",
                "sparse_ref_attn/**/*.md")  # fmt: skip
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if "__pycache__" not in path.parts)


WRONG = ["sra.adapters.patch", "sra.config.Guard", "sra.pach"]
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
RESOLVE = """
import functools
public, missing = set(dir(sra)), []
for name in json.load(sys.stdin):
    head, *rest = name.split(".")[1:]
    try:
        if head not in public:
            missing.append(name)  # or it is there only because something has imported it by now
        else:
            functools.reduce(getattr, rest, getattr(sra, head))
    except (ImportError, AttributeError):
        missing.append(name)
"""
STEPS = (
    "import sparse_ref_attn as sra",
    "import torch",
    RESOLVE,
    "for name in sra.__all__: getattr(sra, name)",
    "import sparse_ref_attn.cost, sparse_ref_attn.schedules, sparse_ref_attn.models",
    "import sparse_ref_attn.functional",
)
FRESH = f"""
import json, sys
found = []
for step in {STEPS!r}:
    exec(step)
    torch = sys.modules.get("torch")
    found.append({{
        "heavy": [name for name in {HEAVY!r} if name in sys.modules],
        "cuda": torch is not None and torch.cuda.is_initialized(),
    }})
print(json.dumps([found, missing]))
"""


def found(start: str, text: str) -> set[str]:
    """Dotted names in `text` that are none of files."""
    names = re.findall(rf"{start}(?:\.[A-Za-z_]\w*)+", text)
    files = ("h", "json", "jsonl", "md", "png", "py")
    return {name for name in names if name.rpartition(".")[2] not in files}


@pytest.fixture(scope="module")
def fresh() -> tuple[list[dict[str, Any]], list[str]]:
    """What a fresh interpreter has loaded after each of `STEPS`, and the names that a reader types and it has not."""
    text = documentation()
    assert text.count("sra.") > 50
    assert "sra.config.UniformGuard" in text
    text += f" sra.patch(pipe) {' '.join(WRONG)} [sra.h]"
    typed = json.dumps(sorted(found(r"(?<![\w./])sra", text)))
    run = subprocess.run(
        [sys.executable, "-c", FRESH], input=typed, capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded, missing = json.loads(run.stdout.splitlines()[-1])
    return loaded, missing


def test_import_is_lean(fresh: tuple[list[dict[str, Any]], list[str]]) -> None:
    """No public name loads diffusers or kernels, nor do costs, the models' stream maps and the door of the ops."""
    lean, bare, typed, every, costs, door = fresh[0]
    assert lean == {"heavy": [], "cuda": False}
    assert typed == every == costs == door == bare


def nowhere(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return True
    return False


def test_every_dotted_name_of_the_documentation_exists(fresh: tuple[list[dict[str, Any]], list[str]]) -> None:
    """``sra.a.b`` is what a reader types, so a bare import must be enough. ``sparse_ref_attn.a.b``, and `a.b` of a
    module of the package, say where something is. Those that are nowhere are found out in the midst of it."""
    text = documentation()
    assert sorted(fresh[1]) == sorted(WRONG)
    right = "sparse_ref_attn.toy.words `types.TokenLayout`"
    text += f" {right} sparse_ref_attn.toy.word `types.X` `eval.json`"
    short = found(rf"(?<=`)(?:{'|'.join(MODULES)})", text)
    full = found(r"(?<![\w./])sparse_ref_attn", text) | {f"sparse_ref_attn.{name}" for name in short}
    assert set(filter(nowhere, full)) == {"sparse_ref_attn.toy.word", "sparse_ref_attn.types.X"}
