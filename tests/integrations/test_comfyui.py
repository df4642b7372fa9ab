"""The ComfyUI package as far as it can be told without ComfyUI: what it declares, its example, and its arithmetic."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, rows
from integrations.comfyui.nodes import OFFERED
from sparse_ref_attn.errors import UnsupportedModelError
from sparse_ref_attn.eval.ways import WAYS
from sparse_ref_attn.vocabulary import CHOSEN_PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
WORKFLOWS = sorted((FOLDER / "example_workflows").glob("*.json"))


def sockets(node: Any) -> dict[str, tuple[Any, ...]]:
    return {name: kind for part in node.INPUT_TYPES().values() for name, kind in part.items()}


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_nodes_declare_what_comfyui_asks_for(name: str) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    assert set(node.INPUT_TYPES()) <= {"required", "optional", "hidden"}
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    assert callable(getattr(node(), node.FUNCTION))
    assert node.CATEGORY
    assert node.DESCRIPTION
    assert NODE_DISPLAY_NAME_MAPPINGS[name]
    for kind in sockets(node).values():
        assert isinstance(kind[0], (str, list))


def test_the_rules_are_the_vocabulary() -> None:
    kind, options = sockets(NODE_CLASS_MAPPINGS["SparseReferences"])["rule"]
    assert kind == list(OFFERED)
    assert options["default"] in kind
    assert set(WAYS) - set(kind) == {*CHOSEN_PRESETS, "downscaled", "ToMe", "cache", "tiles"}


def test_comfyui_can_load_the_folder_from_anywhere() -> None:
    """As its loader does: by path, under a name that is no package's."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        assert set(module.NODE_CLASS_MAPPINGS) == set(NODE_CLASS_MAPPINGS)
    finally:
        for loaded in [loaded for loaded in sys.modules if loaded.startswith(name)]:
            del sys.modules[loaded]


def test_the_package_depends_on_the_library() -> None:
    told = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert told["project"]["dependencies"] == (FOLDER / "requirements.txt").read_text().split()
    assert "sparse-ref-attn" in told["project"]["dependencies"]
    assert told["tool"]["comfy"]["DisplayName"] == NODE_DISPLAY_NAME_MAPPINGS["SparseReferences"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_examples_are_whole(path: Path) -> None:
    flow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in flow["nodes"]}
    for number, source, out, target, into, kind in flow["links"]:
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == number
        assert nodes[source]["outputs"][out]["type"] == kind
        assert nodes[target]["inputs"][into]["type"] in (kind, "*")
    own = [node for node in nodes.values() if node["type"] in NODE_CLASS_MAPPINGS]
    assert {node["type"] for node in own} == set(NODE_CLASS_MAPPINGS)
    for node in own:
        kinds = sockets(NODE_CLASS_MAPPINGS[node["type"]])
        widgets = [n for n, kind in kinds.items() if isinstance(kind[0], list) or kind[0] in ("FLOAT", "INT")]
        assert [entry["name"] for entry in node["inputs"]] == [n for n in kinds if n not in widgets]
        assert len(node["widgets_values"]) == len(widgets)
        for name, value in zip(widgets, node["widgets_values"], strict=True):
            kind, options = kinds[name]
            assert value in kind if isinstance(kind, list) else options["min"] <= value <= options["max"]
        outputs = NODE_CLASS_MAPPINGS[node["type"]]
        assert [entry["type"] for entry in node["outputs"]] == list(outputs.RETURN_TYPES)


def test_there_is_an_example() -> None:
    assert WORKFLOWS


def test_a_latent_makes_one_row_a_patch() -> None:
    latent = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    packed = rows.pack(latent, 2)
    assert packed.shape == (2, 6, 12)
    assert torch.equal(packed[1, 4], latent[1, :, 2:4, 2:4].flatten())
    assert torch.equal(rows.pack(latent[:, :, None], 2), packed)
    assert rows.pack(latent[..., :5], 2).shape == (2, 6, 12)  # padded to whole patches
    assert rows.rows_of(latent[..., :5], 2) == (6, (2, 3))
    assert rows.rows_of(latent[:, :, None].expand(-1, -1, 4, -1, -1), 2) == (24, None)


def test_which_items_have_the_prompt() -> None:
    assert rows.conditional_of([1, 0], 4) == slice(2, 4)
    assert rows.conditional_of([0, 0, 1], 3) == slice(0, 2)
    assert rows.conditional_of([0, 1, 0], 3) is None
    assert rows.conditional_of([1], 1) is None


def test_masks_of_all_rows_are_cut_and_others_are_not() -> None:
    kept = torch.tensor([0, 1, 3])
    mask = torch.arange(36).reshape(1, 6, 6)
    assert torch.equal(rows.cut_mask(mask, 2, kept, 6), mask[:, [0, 1, 2, 3, 5]][..., [0, 1, 2, 3, 5]])
    assert rows.cut_mask(mask[:, 0], 2, kept, 6).shape == (1, 5)
    text = torch.ones(1, 2)
    assert rows.cut_mask(text, 2, kept, 6) is text


def test_a_model_of_another_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Qwen-Image-Edit family, got Linear"):
        rows.kinds_of(torch.nn.Linear(1, 1))
