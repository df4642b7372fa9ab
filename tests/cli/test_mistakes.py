"""A mistake is one clear line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparse_ref_attn.cli import main
from tests.cli.commands import KLEIN, TINY
from tests.pictures import picture

RUN = ["run", "--model", "{models}/kontext", "--prompt", "x", "--out", "{out}", "--image", "{photo}"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TINY, "--out", "{out}", "--image", "{out}/none.png"], "does not exist"),
        ([*TINY, "--out", "{out}", "--image", "{text}"], "format that Pillow reads"),
        ([*TINY, "--out", "{out}", "--keep", "0"], "keep must be a number of tokens"),
        ([*TINY, "--out", "{out}", "--keep", "1.5"], "keep must be a share in (0, 1]"),
        ([*TINY, "--out", "{out}", "--keep", "65"], "65"),
        ([*TINY, "--out", "{out}", "--keep", "most"], "must be a share"),
        ([*TINY, "--out", "{out}", "--keep", "1"], "write 100% to keep all"),
        ([*TINY, "--out", "{out}", "--preset", "recast", "--keep", "0.0"], "must be a share in (0, 1]"),
        ([*TINY, "--out", "{out}", "--preset", "recast", "--keep", "nan"], "must be a share in (0, 1]"),
        ([*TINY, "--out", "{out}", "--preset", "recast", "--keep", "9"], "must be a share"),
        ([*TINY, "--out", "{out}", "--preset", "recast", "--keep", "50%"], "got 50 % where they are 50 % of 2 steps"),
        ([*TINY, "--out", "{out}", "--preset", "best"], "fast, recast, sparse-context, got 'best'"),
        ([*TINY, "--out", "{text}"], "must be a directory"),
        ([*TINY, "--out", "{text}/below"], "must be a directory"),
        ([*TINY, "--out", "{out}", "--steps", "0"], "at least 1"),
        ([*TINY], "--out"),
        ([*RUN, "--image", "{photo}"], "takes one reference image, got 2"),
        ([*RUN, "--set", "strength=1"], "got strength"),
        ([*RUN, "--set", "strength"], "NAME=VALUE"),
        (
            [
                "compare",
                "--out",
                "{out}",
                "--model",
                "{models}/kontext",
                "--prompt",
                "x",
                "--image",
                "{photo}",
                "--height",
                "32",
            ],
            "must be given together",
        ),
        (["run", "--prompt", "x", "--out", "{out}/o.png"], "an image must be given, a folder or a .jsonl file"),
        (["run", "{photo}", "--out", "{out}/o.png"], "a prompt must say what to make, got none"),
        (["run", "{photo}", "-p", "x"], "the following arguments are required: -o/--out"),
        (["run", "{photo}", "-p", "x", "-o", "{out}/o.gif"], "the output must end in .png, .jpg, .jpeg, got"),
        (["run", "{photo}", "-p", "x", "-o", "{text}/o.png"], "must lie in a folder that can be written to, got"),
        (["run", "{photo}", "-p", "x", "-o", "{photo}"], "the output must not be one of the references"),
        (["run", "{photo}", "-p", "x", "-o", "{small}"], "must be new, or a picture that sra run made, got"),
        (["run", "{out}", "-p", "x", "-o", "{out}/o"], "a folder of pictures must hold at least one"),
        (["run", "{out}", "{photo}", "-p", "x", "-o", "{out}/o"], "must stand alone, got {out} beside {photo}"),
        (
            ["run", "{photo}", "-p", "x", "-o", "{out}/o.png", "--seed", "18446744073709551615", "--num-images", "2"],
            "seeds must lie in [0, 2**64), got 2 from",
        ),
        (["run", "{photo}", "-p", "x", "-o", "{out}/o.png", "--width", "64"], "--width must come with --model"),
        (["run", "{photo}", "{small}", "{photo}", "-p", "x", "-o", "{out}/o.png"], "takes one reference or two, got 3"),
        (["run", "{photo}", "-p", "x", "-o", "{out}/o.png", "--keep", "5%", "--steps", "4"], "25 % of 4 steps"),
        (["run", "{photo}", "-p", "x", "-o", "{out}/o.png", "--from-block", "6"], "below the model's 6 blocks, got 6"),
        (["run", "{photo}", "-p", "x", "-o", "{out}/o.png", "--lora", ":2"], "must be PATH or PATH:SCALE"),
        (["run", "{photo}", "-p", "x", "-o", "{out}/o.png", "--guidance", "inf"], "must be a number of at least 0"),
        ([*RUN, "--model", "none"], "a pipeline's directory or a hub id, got none, which is neither"),
        ([*RUN, "--model", "klein-9b"], "got klein-9b, which is a name that sra estimate knows, without weights"),
        ([*RUN, "--lora", "none.safetensors"], "none.safetensors, which does not exist"),
        ([*RUN, "--width", "30"], "width must be a multiple of 4 pixels, got 30: 28 or 32"),
        ([*RUN, "--negative", "y"], "must come with true_cfg_scale set above 1 (--set), or it does nothing, got 1"),
        ([*RUN, "--model", "{models}/klein_kv", "--guidance", "2"], "Flux2KleinKVPipeline must have no guidance"),
        ([*RUN, "--model", "{models}/klein", "--negative", "y"], "must have no negative prompt"),
        ([*RUN, "--device", "quantum"], "one that torch knows"),
        ([*RUN, "--device", "cpu", "--offload", "model"], "needs a CUDA device"),
        ([*RUN, "--model", "{out}"], "must hold model_index.json"),
        ([*RUN, "--model", "{models}/kontext_inpaint"], "got FluxKontextInpaintPipeline"),
        (
            [*RUN, "--model", "{models}/klein", "--image", "{small}", *KLEIN],
            "Flux2KleinPipeline refused the call: Image",
        ),
        ([*TINY, "--out", "{out}", "--execute", "kv"], "must be one of tokens, cache, both, got 'kv'"),
        ([*TINY, "--out", "{out}", "--layers", "1,half"], "must be factors in (0, 1]"),
        ([*TINY, "--out", "{out}", "--layers", "1,0.5"], 'with execute="cache" or "both", got'),
        ([*TINY, "--out", "{out}", "--from-block", "-1"], "at least 0"),
        ([*TINY, "--out", "{out}", "--from-block", "3"], "from_block must lie below the model's 3 blocks, got 3"),
        ([*TINY, "--out", "{out}", "--profile", "in_flight"], "needs a selector (or a guard) that measures"),
        ([*TINY, "--out", "{out}", "--profile-blocks", "1"], 'with profile="in_flight" only'),
        ([*TINY, "--out", "{out}", "--rerank-every", "0"], "at least 1"),
        (
            [*TINY, "--out", "{out}", "--refresh", "often"],
            "must be steps (4), a share (25%), several of them (0,4,8), nev",
        ),
        ([*TINY, "--out", "{out}", "--refresh", "0"], "n must be a number of steps of at least 1"),
        ([*RUN, "--cache-rows", "some"], "must be one of budget, all, got 'some'"),
        (
            ["compare", "--out", "{out}/c", "--methods", "ToMe", "downscaled", "--execute", "cache"],
            "ToMe, downscaled: a rival that changes tokens",
        ),
        (
            ["estimate", "--model", "kontext", "--preset", "recast", "--refresh", "never"],
            'refresh goes with execute="cache" or "both" only',
        ),
        (["estimate", "--model", "klein-9b", "--execute", "cache", "--layers", "1"], "each of the 32 attention layers"),
        (["estimate", "--model", "{out}"], "kontext, flux2-dev"),
        (["estimate", "--model", "kontext", "--size", "1024"], "WIDTHxHEIGHT"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, models: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "text").write_text("not an image")
    picture(32, 32).save(tmp_path / "small.png")
    places = {
        "small": tmp_path / "small.png",
        "out": tmp_path / "out",
        "text": tmp_path / "text",
        "models": models,
        "photo": photo,
    }
    assert main([argument.format(**places) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sra: error: ")]
    assert len(errors) == 1
    assert words.format(**places) in errors[0]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
@pytest.mark.parametrize("arguments", [TINY, RUN[:-4] + RUN[-2:]])
def test_a_missing_package_is_named(
    package: str, arguments: list[str], tmp_path: Path, models: Path, photo: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    given = [argument.format(models=models, photo=photo) for argument in arguments]
    assert main([*given, "--out", str(tmp_path)]) == 2
    assert "pip install 'sparse-ref-attn[diffusers]'" in capsys.readouterr().err
