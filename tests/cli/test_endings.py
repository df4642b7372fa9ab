"""Whatever ends a command is one line, the exit code of its kind, and what was computed is saved."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_ref_attn.cli import calling, failures, main
from sparse_ref_attn.cli.memory import memory_of
from sparse_ref_attn.presets import configuration
from tests.cli.commands import KLEIN, KONTEXT, TINY, pixels, run, sparse_run
from tests.pictures import picture
from tests.pipelines import CASES


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int) -> None:
    """The pipeline's call number `at`, counted from 0 with the two of the warm-up, raises."""
    real = calling.caller

    def caller(*arguments: Any) -> Callable[[int], Any]:
        call, count = real(*arguments), iter(range(100))

        def counted(steps: int) -> Any:
            if next(count) == at:
                raise error
            return call(steps)

        return counted

    monkeypatch.setattr(calling, "caller", caller)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "sra: stopped"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 3, "memory must hold the run, got: CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "a smaller --width and --height"),
        (MemoryError(), 3, "got: MemoryError; a smaller"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "must fit on the disk, got: [Errno 28] No space"),
        (ZeroDivisionError("division\nby zero"), 4, "ZeroDivisionError: division by zero (unexpected: sra --traceback"),
    ],
)
def test_what_escapes_is_one_line_and_the_picture_before_it_is_saved(
    error: BaseException, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    failing(monkeypatch, error, at=3)  # the sparse run, after the dense one
    assert main([*TINY, "--out", str(tmp_path / "out")]) == code
    assert code in failures.CODES
    assert pixels(tmp_path / "out" / "dense.png").shape == (32, 32, 3)
    said = [line for line in capsys.readouterr().err.splitlines() if line and "it/s]" not in line]
    assert said[0].startswith("Saved before it ended in ")
    assert said[0].endswith("dense.png")
    assert len(said) == 2
    assert words in said[1]


def test_a_traceback_is_there_for_whom_it_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError(), at=0)
    with pytest.raises(ZeroDivisionError):
        main(["--traceback", *TINY, "--out", str(tmp_path)])


def test_out_of_memory_names_what_needs_less() -> None:
    from argparse import Namespace

    import sparse_ref_attn as sra

    pipe = CASES["klein_kv"].build()
    arguments = {"image": [picture(64, 48), picture(32, 32)], "height": 64, "width": 128}
    words = memory_of(pipe, sra.SparseRef("edges", 0.5, "cache"), arguments, Namespace(offload="none"))()
    for part in ("--offload model", "--offload sequential", "now 128 x 64 pixels", "now 64 x 48, 32 x 32"):
        assert part in words
    assert "the reference cache holds 0.0 GB (all tokens: 0.0 GB), less with a smaller --keep" in words
    words = memory_of(pipe, configuration("balanced"), arguments, Namespace(offload="none"))()
    assert "(all tokens: 0.0 GB), none with --preset sparse-context or recast, which drop tokens" in words
    words = memory_of(pipe, sra.SparseRef("edges", 0.5), {"image": picture()}, Namespace(offload="sequential"))()
    assert "--offload" not in words
    assert "cache" not in words
    assert "now the pipeline's own size" in words


def test_a_second_run_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    """The pictures of another model's demo lay beside the new report."""
    (tmp_path / "mine.png").write_text("not of ours")
    run("demo", "--out", tmp_path, "--steps", "1")
    first = {path.name for path in tmp_path.iterdir()}
    assert {"answer.png", "row.png", "references.png", "dense.png"} < first
    run(*TINY, "--out", tmp_path)
    second = {path.name for path in tmp_path.iterdir()} - {"fewer steps.png"}  # there where one step takes no longer
    assert second == {"mine.png", "dense.png", "sparse.png", "kept.png", "report.json"}
    assert sparse_run(tmp_path)["references"][0]["tokens"] == 64


def test_a_folder_of_somebody_else_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "row.png").write_text("a user's own")
    run(*TINY, "--out", tmp_path)
    assert (tmp_path / "row.png").read_text() == "a user's own"


def test_compare_saves_each_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt(), at=5)  # three of warm-up, dense, edges
    assert main(["compare", *TINY[1:], "--methods", "edges", "grid", "--out", str(tmp_path)]) == 130
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"reference.png", "dense.png", "edges.png"}


RUN = ["run", "--model", "{models}/kontext", "--prompt", "x", "--out", "{out}", "--image", "{photo}", *KONTEXT]
KLEIN_RUN = ["run", "--model", "{models}/klein", "--prompt", "x", "--out", "{out}", "--image", "{photo}", *KLEIN]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*RUN, "--set", "num_images_per_prompt=2"], "num_images_per_prompt must not be set beside the call: a call"),
        ([*RUN, "--set", "output_type=np"], "output_type must not be set"),
        ([*RUN, "--set", "output_type=latent"], "output_type must not be set"),
        ([*RUN, "--set", "return_dict=false"], "return_dict must not be set"),
        ([*RUN, "--set", "prompt=[1]"], "prompt must not be set"),
        ([*RUN, "--set", "guidance_scale=much"], "guidance_scale of FluxKontextPipeline must be float, got 'much'"),
        ([*RUN, "--set", "max_sequence_length=1.5"], "max_sequence_length of FluxKontextPipeline must be int, got 1.5"),
        ([*RUN, "--set", "_auto_resize=1"], "_auto_resize of FluxKontextPipeline must be bool, got 1"),
        ([*RUN, "--set", "latents=[1]"], "latents of FluxKontextPipeline must be torch.FloatTensor | None, got [1]"),
        ([*RUN, "--set", 'sigmas=[1, "a"]'], "sigmas of FluxKontextPipeline must be"),
        ([*RUN, "--device", "mps"], "device mps must be one that this torch can compute on"),
        ([*RUN, "--device", "meta"], "device meta must be one that this torch can compute on"),
        ([*RUN, "--seed", "18446744073709551616"], "must be a whole number in [0, 2**64)"),
        ([*RUN, "--model", "{unknown}"], "that diffusers can load, got {unknown}: AttributeError"),
        ([*RUN, "--model", "{broken}"], "{broken}/model_index.json must be a JSON object, got "),
        (["demo", "--out", "{out}/result.png"], "the output must be a directory, got {out}/result.png, which is named"),
        ([*KLEIN_RUN, "--height", "104", "--width", "70"], "must be multiples of 8 pixels, got 104 x 70: 104 x 64 or"),
        (["train", "--steps", "1", "--out", "{out}/lora.safetensors"], "lora.safetensors, which is named like a file"),
        (["eval", "--data", "{out}", "--out", "{out}/e"], "--data must come with --models"),
        (["eval", "--out", "{out}/e", "--set", "output_type=np"], "output_type must not be set"),
        (["eval", "--out", "{out}/e", "--device", "mps", "--keep", "50%", "--rules", "grid"], "device mps must be one"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_computed(
    arguments: list[str], words: str, models: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each was a traceback after both pictures were computed, or a picture that nobody asked for."""
    for name, index in (("unknown", {"_class_name": "FluxOtherPipeline"}), ("broken", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "out").mkdir()
    places = {name: str(tmp_path / name) for name in ("out", "unknown", "broken")}
    places |= {"models": str(models), "photo": str(photo)}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert words.format(**places) in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))


def test_the_largest_seed_makes_a_picture(tmp_path: Path) -> None:
    run(*TINY, "--out", tmp_path, "--seed", str(2**64 - 1))
    assert not np.array_equal(pixels(tmp_path / "dense.png"), pixels(tmp_path / "sparse.png"))
