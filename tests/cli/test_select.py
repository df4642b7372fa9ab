"""``--select learned`` and a trained selector's file: on the model that they are for, and refused on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.cli.recorded import record_of
from sparse_ref_attn.cli.session import shareable
from sparse_ref_attn.selection.head import Head, Origin
from sparse_ref_attn.selection.learned import SHIPPED
from tests.cli.commands import KONTEXT, pixels, run


def test_a_trained_selector_on_its_model(photo: Path, tmp_path: Path) -> None:
    own = shutil.copy(SHIPPED, tmp_path / "own.safetensors")
    command = ["run", photo, "-p", "swap rows red to-blue", "--steps", "2", "--keep", "25%", "--preset", "recast"]
    command += ["--task", "subject", "--json", "-o"]
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    found = [json.loads(run(*command, out, "--select", name)) for out, name in ((first, "learned"), (second, own))]
    assert [told["config"]["select"] for told in found] == [{"kind": "learned", "path": p} for p in (None, str(own))]
    record = record_of(second)
    assert record is not None
    assert record["config"]["select"] == {"kind": "learned", "path": "own.safetensors"}
    assert np.array_equal(pixels(first), pixels(second))
    Head(64, sra.Learned().head().origin, text=96).save(own)  # another head under the same name is another picture
    assert json.loads(run(*command, second, "--select", own))["status"] == "made"
    assert not np.array_equal(pixels(first), pixels(second))


def test_another_model_is_refused(
    models: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Head(64, Origin("Other"), channels=2).save(tmp_path / "other.safetensors")
    command = ["run", str(photo), "-p", "x", "-o", str(tmp_path / "o.png"), "--steps", "2", *KONTEXT]
    for name, said in (
        ("learned", "the learned selector that ships must be used with the model that it was trained for"),
        (f"{tmp_path}/other.safetensors", "trained for, Other, got FluxTransformer2DModel of"),
        ("nowhere.safetensors", "a learned selector must be a file, got 'nowhere.safetensors'"),
        ("learnt", "did you mean 'learned'?"),
    ):
        assert main([*command, "--model", str(models / "kontext"), "--select", name]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


def test_a_picture_names_files_and_no_folders() -> None:
    select = sra.Union((sra.Learned("/home/me/head.safetensors"), sra.Edges()))
    config = sra.SparseRef(select, 0.5).to_dict()
    found = shareable({"images": ["/home/me/cup.png"], "loras": [], "config": config, "model": None})
    assert "/home" not in json.dumps(found)
    assert "head.safetensors" in json.dumps(found["config"]["select"])
    assert "/home" in json.dumps(config)
