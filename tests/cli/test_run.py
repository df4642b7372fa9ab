"""`sra run` on tiny saved pipelines is the call in Python."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.cli import execution, main
from sparse_ref_attn.eval.calls import call_arguments
from tests.cli.commands import KLEIN, KONTEXT, pixels, report, run
from tests.pictures import picture
from tests.pipelines import CASES


def test_run_kontext_equals_the_python_call(models: Path, photo: Path, tmp_path: Path) -> None:
    run(
        "run", "--model", models / "kontext", "--image", photo, "--prompt", "a cat", "--out", tmp_path, "--steps", "3",
        "--preset", "sparse-context", "--select", "grid", "--keep", "24", "--seed", "5", *KONTEXT,
    )  # fmt: skip
    pipe = CASES["kontext"].build()
    arguments = {
        "prompt": "a cat", "image": PIL.Image.open(photo), "height": 32, "width": 32, "max_area": 32 * 32,
        "_auto_resize": False, "max_sequence_length": 32, "num_inference_steps": 3,
    }  # fmt: skip
    dense = pipe(**arguments, generator=torch.Generator().manual_seed(5)).images[0]
    with sra.patched(pipe, sra.SparseContext(24, "grid")):
        sparse = pipe(**arguments, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.array_equal(pixels(tmp_path / "dense.png"), np.asarray(dense))
    assert np.array_equal(pixels(tmp_path / "sparse.png"), np.asarray(sparse))
    assert not np.array_equal(np.asarray(dense), np.asarray(sparse))
    found = report(tmp_path)
    assert found["run"]["references"][0]["kept_mean"] == 24
    assert found["pipeline"] == "FluxKontextPipeline"
    assert found["images"] == [str(photo)]


def test_run_klein_with_two_references_and_no_dense_run(models: Path, photo: Path, tmp_path: Path) -> None:
    picture(64, 64, 4).save(tmp_path / "second.png")
    text = run(
        "run", "--model", models / "klein", "--image", photo, "--image", tmp_path / "second.png", "--prompt", "a cat",
        "--out", tmp_path / "out", "--height", "64", "--width", "64", "--steps", "2", "--no-compare-dense",
        "--task", "subject", *KLEIN,
    )  # fmt: skip
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"sparse.png", "kept.png", "report.json"}
    found = report(tmp_path / "out")
    assert (
        found["comparison"]["dense"] is found["comparison"]["speedup"] is found["comparison"]["bound_seconds"] is None
    )
    assert found["comparison"]["flop_ratio"] > 1
    assert [r["grid"] for r in found["run"]["references"]] == [[8, 16], [8, 8]]
    assert found["run"]["by_step"]["kind"] == ["profile", "sparse"]
    assert "whole call" in text


def test_run_reads_the_reference_cache_as_it_is_told(models: Path, photo: Path, tmp_path: Path) -> None:
    """Every flag of the cache, and the picture of the same settings in Python."""
    run(
        "run", "--model", models / "klein_kv", "--image", photo, "--prompt", "a cat", "--out", tmp_path, "--steps", "3",
        "--preset", "sparse-context", "--select", "grid", "--keep", "50%", "--execute", "both", "--layers", "1,0.5,1,1",
        "--cache-rows", "all", "--set", "max_sequence_length=48", "--set", "text_encoder_out_layers=[1, 2, 3]",
    )  # fmt: skip
    found = report(tmp_path)["run"]
    config = sra.SparseContext(0.5, "grid", execute="both", layers=(1.0, 0.5, 1.0, 1.0), cache_rows="all")
    assert found["config"] == json.loads(config.to_json())
    assert found["by_step"]["kind"] == ["sparse", "cached", "cached"]
    pipe = CASES["klein_kv"].build()
    with sra.patched(pipe, config):
        image = pipe(
            prompt="a cat", image=PIL.Image.open(photo), num_inference_steps=3, max_sequence_length=48,
            text_encoder_out_layers=(1, 2, 3), generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
    difference = pixels(tmp_path / "sparse.png").astype(int) - np.asarray(image)
    assert (
        abs(difference).max() <= 1
    )  # weights read from a file lie elsewhere in memory, and round otherwise, dense too


@pytest.mark.parametrize(
    ("flags", "kinds", "config"),
    [
        (["--from-block", "1"], ["sparse"] * 4, {"from_block": 1}),
        (
            ["--preset", "recast", "--profile", "in_flight", "--profile-blocks", "2"],
            ["in_flight", *["sparse"] * 3],
            {"profile": "in_flight", "profile_blocks": 2},
        ),
        (
            ["--preset", "recast", "--rerank-every", "2"],
            ["profile", "sparse", "profile", "sparse"],
            {"rerank_every": 2},
        ),
        (
            ["--execute", "cache", "--refresh", "0,3"],
            ["dense", "cached", "cached", "dense"],
            {"execute": "cache", "refresh": {"kind": "At", "places": [0, 3]}},
        ),
        ([], ["sparse"] * 4, {}),
    ],
)
def test_demo_takes_its_execution_from_the_flags(
    flags: list[str], kinds: list[str], config: dict[str, Any], tmp_path: Path
) -> None:
    run("demo", "--size", "tiny", "--steps", "4", "--keep", "0.6", "--out", tmp_path, *flags)
    found = report(tmp_path)["run"]
    assert found["by_step"]["kind"] == kinds
    default = json.loads(sra.SparseRef().to_json())
    fields = ("execute", "from_block", "profile", "profile_blocks", "layers", "cache_rows", "rerank_every", "refresh")
    assert {name: found["config"][name] for name in fields} == {name: default[name] for name in fields} | config


def test_the_flags_are_those_of_the_configuration_and_the_same_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for command in ("demo", "run", "compare", "estimate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told.append(capsys.readouterr().out.partition("\nexecution:\n")[2].partition("\n\n")[2])
    assert len(set(told)) == 1
    flags = {flag.lstrip("-").replace("-", "_") for flag in re.findall(r"^  (--[a-z-]+)", told[0], re.MULTILINE)}
    assert flags == set(execution.FIELDS) <= set(inspect.signature(sra.SparseRef).parameters)


def test_several_images_are_one_list_where_the_pipeline_takes_one(photo: Path) -> None:
    images = [picture(), picture(seed=1)]
    arguments = call_arguments(CASES["qwen_edit_plus"].build(), images, "a cat", more={"true_cfg_scale": 1.0})
    assert arguments["image"] == images
    assert arguments["num_inference_steps"] == 50
    with pytest.raises(sra.ConfigError, match="takes one reference image, got 2"):
        call_arguments(CASES["qwen_edit"].build(), images, "a cat")
