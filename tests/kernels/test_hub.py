"""A wheel laid out as a kernel of the Hugging Face hub: loaded as it is, beside the installed package."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from .wheels import ROOT, whole_wheel

SCRIPT = ROOT / "csrc" / "hub.py"

BY_HAND = """
def load(home):
    variant = home / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
BY_KERNELS = """
def load(home):
    import kernels
    return kernels.get_local_kernel(home)
"""
PROGRAM = """
import importlib.util, json, sys
from importlib import import_module
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_ref_attn.functional as installed
{load}
home = Path(sys.argv[1])
hub = load(home)
assert hub.functional.gather_attention is not installed.gather_attention

torch.manual_seed(0)
q, bank = torch.randn(32, 2, 64), torch.randn(24, 2, 64)
kept = torch.tensor([[5, 2, 9], [20, 0, 1]])
tiles = dict(k_ref=bank, v_ref=bank, ref_indices=kept, cu_tiles=torch.tensor([0, 16, 32]))
found = hub.functional.gather_attention(q, **tiles, backend="cpp")
for tile, rows in zip(q.double().split(16), kept, strict=True):
    weights = torch.einsum("qhc,khc->hqk", tile / 8, bank[rows].double()).softmax(-1)
    right = torch.einsum("hqk,khc->qhc", weights, bank[rows].double())
    torch.testing.assert_close(found[:16].double(), right, rtol=0, atol=1e-5)
    found = found[16:]

for library in ("library", "cpu_library"):
    path = import_module(hub.__name__ + ".kernels." + library).library().path
    assert path.is_relative_to(home / "build" / "torch-cpu" / "lib"), path
with FakeTensorMode(allow_non_fake_inputs=True):
    shapes = getattr(torch.ops, hub.__name__).pack_rows([torch.empty(2, 5)], torch.tensor([4, 1]), 1, "auto")
assert [tuple(x.shape) for x in shapes] == [(2, 2)]
assert hasattr(torch.ops.sparse_ref_attn, "pack_rows")
print(hub.__name__)
"""


@pytest.fixture(scope="module")
def hub(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script lays out."""
    home = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, str(SCRIPT), str(whole_wheel()[0]), str(home)], check=True)
    return home


@pytest.mark.parametrize("load", [BY_HAND, BY_KERNELS], ids=["by hand", "kernels"])
def test_it_loads_beside_the_package_and_computes_by_its_own_library(hub: Path, load: str, tmp_path: Path) -> None:
    if load == BY_KERNELS and find_spec("kernels") is None:
        pytest.skip("the package kernels is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(load=load), str(hub)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("_sparse_ref_attn_cpu_")


def test_each_variant_is_the_package_with_the_digest_of_every_file(hub: Path) -> None:
    with zipfile.ZipFile(whole_wheel()[0]) as archive:
        package = {name for name in archive.namelist() if name.startswith("sparse_ref_attn/")}
    ids = set()
    for backend in ("cpu", "cuda"):
        variant = hub / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        digest = metadata["digest"]["files"]
        assert {f"sparse_ref_attn/{name}" for name in digest} == package
        for name, code in digest.items():
            assert base64.b64decode(code) == hashlib.sha256((variant / name).read_bytes()).digest()
        assert metadata["backend"] == {"type": backend}
        ids.add(metadata["id"])
    assert len(ids) == 2
    assert all(name.isidentifier() for name in ids)


def test_what_is_no_wheel_of_the_package_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "sparse_ref_attn-0.1.0-py3-none-any.whl"
    other.write_text("no archive")
    for path in (other, tmp_path / "another-1.0-py3-none-any.whl"):
        command = [sys.executable, str(SCRIPT), str(path), str(tmp_path / "out")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert run.stderr == f"WHEEL must be a wheel of sparse_ref_attn, got {path}\n"
    assert not (tmp_path / "out").exists()
