"""Where the saving happens is said by the same flags in every command."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.cli import execution, main
from sparse_ref_attn.eval.checked_arguments import call_arguments
from tests.cli.commands import run, sparse_run
from tests.pictures import picture
from tests.pipelines import CASES


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
    found = sparse_run(tmp_path)
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
