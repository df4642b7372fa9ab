"""diffusers' internals are touched in one place: no other file reads a private name that is not the library's own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch import nn

import sparse_ref_attn as sra
from sparse_ref_attn.hooks.diffusers import check_parts
from sparse_ref_attn.models import adapter_for
from tests.pipelines import CASES

PACKAGE = Path(sra.__path__[0])
PLACE = PACKAGE / "hooks" / "diffusers"
KERNELS = PACKAGE / "ops"  # reaches torch's and flash-attn's kernels
OTHERS = ("torch", "numpy", "np", "nn", "sys", "argparse")  # whose private names are not diffusers'
TORCH = {
    "_compiled_call_impl",
    "_dynamic",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_asdict",
    "_debug_get_cache_entry_list",
    "_get_cache_entries_for_region",
    "_isolate_recompiles_id",
    "_recompile_limit",
}  # of nn.Module, torch.compile, named tuples


def private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def own_names(trees: list[ast.Module]) -> set[str]:
    """Private names that the library defines: functions, classes, attributes of its own objects, fields."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root(node) == "self":
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if private(name)}


def touches(tree: ast.Module, own: set[str]) -> list[str]:
    """What a file reaches of others' internals: private attributes, by name or by string, and modules of diffusers."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own and root(node) not in OTHERS:
            found.append(f"line {node.lineno}: {node.attr}")
        if isinstance(node, ast.Call) and root(node) in ("getattr", "hasattr", "setattr", "delattr", "vars"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and private(a.value)]
            found += [f"line {node.lineno}: {name}" for name in names if name not in own]
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.Call) and root(node) in ("import_module", "importlib"):
            modules += [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        found += [f"line {node.lineno}: {name}" for name in modules if name.startswith("diffusers.")]  # type: ignore[attr-defined]
    return found


def test_no_other_file_touches_diffusers_internals() -> None:
    files = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    own = own_names(list(files.values()))
    elsewhere = {
        str(path.relative_to(PACKAGE)): found
        for path, tree in files.items()
        if not {PLACE, KERNELS} & set(path.parents) and (found := touches(tree, (own | TORCH) - {"_backends"}))
    }
    assert elsewhere == {}
    assert any(touches(tree, own) for path, tree in files.items() if PLACE in path.parents)


@pytest.mark.parametrize(
    "line",
    [
        "pipe._encode_vae_image(x)",
        "getattr(module, '_diffusers_hook', None)",
        "from diffusers.models.embeddings import apply_rotary_emb",
        "importlib.import_module('diffusers.models.embeddings')",
        "block.attn.processor._attention_backend = None",
    ],
)
def test_a_touch_is_found(line: str) -> None:
    assert touches(ast.parse(line), {"_own"})
    assert not touches(ast.parse("self._own.other; torch._C; run._own"), {"_own"})


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit"])
def test_what_the_hooks_rely_on_is_checked_when_a_model_is_patched(name: str) -> None:
    transformer = CASES[name].build().transformer
    adapter = adapter_for(transformer)
    assert adapter.parts
    for part in adapter.parts:
        *path, last = part.split(".")
        holder = transformer.get_submodule(".".join(path))
        value = getattr(holder, last)
        if last in holder._modules:
            del holder._modules[last]
            with pytest.raises(sra.VersionError, match=f"{part}.* is gone"):
                sra.patch(transformer, sra.SparseRef("grid"))
            holder._modules[last] = value
    handle = sra.patch(transformer, sra.SparseRef("grid"))
    handle.remove()
    with pytest.raises(sra.VersionError, match=r"must have norm_out\.other, .*; norm_out\.other is gone"):
        check_parts(transformer, ["norm_out.other"])


def test_a_module_without_the_parts_is_refused_by_name() -> None:
    with pytest.raises(sra.VersionError, match="Linear must have pos_embed"):
        check_parts(nn.Linear(1, 1), ["pos_embed"])
