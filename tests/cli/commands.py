"""Commands as a user types them, and what they leave."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from sparse_ref_attn.cli import main
from sparse_ref_attn.eval.embedded import SIZES
from sparse_ref_attn.eval.reports.schema import check

TINY = ["demo", "--size", "tiny", "--steps", "2"]
KONTEXT = ["--set", "max_sequence_length=32", "--set", "_auto_resize=false", "--height", "32", "--width", "32"]
KLEIN = ["--set", "max_sequence_length=48", "--set", "text_encoder_out_layers=[1, 2, 3]", "--set", "guidance_scale=1"]


def run(*arguments: object) -> str:
    """Run a command that must succeed; what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(a) for a in arguments]) == 0
    return out.getvalue()


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).copy()


def report(directory: Path) -> dict[str, Any]:
    """What the demo wrote, which fits the schema."""
    found = json.loads((directory / "report.json").read_text())
    check(found, "report.json")
    return found


def sparse_run(directory: Path) -> dict[str, Any]:
    """Of the demo's sparse run, what `PatchHandle.summary` said."""
    return report(directory)["runs"]["sparse"]["run"]


def embedded_call(pipe: Any, image: PIL.Image.Image, steps: int = 2) -> PIL.Image.Image:
    return pipe(
        prompt="the same cup on a marble table", image=image.resize((32, 32)), height=32, width=32, max_area=32 * 32,
        _auto_resize=False, max_sequence_length=SIZES["tiny"].text, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
