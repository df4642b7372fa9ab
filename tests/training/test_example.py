"""``examples/train_kontext_lora.py`` run as a program on tiny pipelines: it learns, resumes, and says what is wrong."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

import sparse_ref_attn as sra
from tests import programs
from tests.pictures import picture
from tests.pipelines import CASES

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_kontext_lora.py"
SETTINGS: dict[str, list[str]] = {
    "kontext": ["--side", "32", "--per-sample", "--keep", "0.2", "0.9"],
    "klein": [
        "--side",
        "64",
        "--text-layers",
        "1",
        "2",
        "3",
        "--gradient-checkpointing",
        "--isolate",
        "--keep",
        "0.1",
        "1.0",
    ],
}
LORA = "pytorch_lora_weights.safetensors"


def write_pairs(folder: Path, references: int, count: int = 3) -> Path:
    folder.mkdir()
    lines = []
    for i in range(count):
        names = [f"{i}-{j}.png" for j in range(references + 1)]
        for j, name in enumerate(names):
            picture(64, 48, 10 * i + j).save(folder / name)
        reference: Any = names[1] if references == 1 else names[1:]
        lines.append(json.dumps({"reference": reference, "target": names[0], "prompt": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--device", "cpu", "--text-tokens", "32", "--batch", "2", "--rank", "2", "--lr", "1e-2"]
    return ["--model", str(model), "--data", str(data), "--out", str(out), *fixed, *more]


@pytest.mark.parametrize(("name", "references"), [("kontext", 1), ("klein", 2)])
def test_end_to_end(name: str, references: int, tmp_path: Path) -> None:
    case = CASES[name]
    case.build().save_pretrained(tmp_path / "model")
    data, settings = write_pairs(tmp_path / "pairs", references), SETTINGS[name]

    def go(out: str, *more: str) -> None:
        arguments = command(tmp_path / "model", data, tmp_path / out, *settings, *more)
        told = programs.run(programs.script, str(EXAMPLE), *arguments, log=tmp_path / f"{out}.log")
        assert f"wrote {tmp_path / out / LORA}" in told

    go("once", "--steps", "4")
    if name == "kontext":  # stopped after two steps and gone on with: the same weights, bit for bit
        go("twice", "--steps", "2", "--checkpoint-every", "1")
        go("twice", "--steps", "4")
        once, twice = (load_file(tmp_path / out / LORA) for out in ("once", "twice"))
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[key], twice[key]) for key in once)
        assert [path.name for path in (tmp_path / "twice").glob("checkpoint-*")] == ["checkpoint-4"]

    with safe_open(tmp_path / "once" / LORA, framework="pt") as file:
        settings_of = json.loads(file.metadata()["sparse_ref_attn"])
    drop = sra.RandomDrop.from_dict(settings_of["random_drop"])
    assert drop.keep == ((0.2, 0.9) if name == "kontext" else (0.1, 1.0))
    assert drop.per_sample == (name == "kontext")
    isolate = settings_of["isolate"]
    assert isolate == (None if name == "kontext" else sra.Isolation().to_dict())

    pipe = case.build()
    before = case.call(pipe, references=references)
    pipe.load_lora_weights(str(tmp_path / "once"))
    after = case.call(pipe, references=references)
    assert abs(after - before).max() > 1e-3
    with sra.patched(pipe, sra.SparseRef("grid", 0.3, "tokens" if isolate is None else "cache")) as handle:
        case.call(pipe, references=references)
        assert {step.kind for step in handle.record.steps} == ({"sparse"} if isolate is None else {"cached"})


def test_words_for_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same program, called in this process."""
    main = runpy.run_path(str(EXAMPLE))["main"]
    model = tmp_path / "model"
    CASES["kontext"].build().save_pretrained(model)
    (tmp_path / "empty").mkdir()
    two, one = write_pairs(tmp_path / "two", 2), write_pairs(tmp_path / "one", 1)
    broken = write_pairs(tmp_path / "broken", 1)
    (broken / "1-0.png").write_text("no picture")
    odd = write_pairs(tmp_path / "odd", 1)
    (odd / "metadata.jsonl").write_text('{"reference": "0-1.png"}')
    for data, more, words in (
        (tmp_path / "empty", [], "a folder of pairs must hold metadata.jsonl, got"),
        (odd, [], "must be a JSON object with reference, target and prompt, got"),
        (two, [], "FLUX.1 Kontext takes one reference a pair, got 2"),
        (broken, [], "an image must be in a format that Pillow reads, got"),
        (one, ["--keep", "0", "1"], "keep must hold ratios with 0 < low <= high <= 1, got (0.0, 1.0)"),
        (one, ["--lr", "inf"], "the loss must be finite, got nan in step 1: try a lower --lr"),
    ):
        arguments = command(model, data, tmp_path / "out", "--side", "32", "--steps", "3", "--quiet", *more)
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out" / LORA).exists()


def test_a_full_disk_and_a_foreign_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest whole checkpoint stays, and another LoRA's is refused."""
    main = runpy.run_path(str(EXAMPLE))["main"]
    model, data, out = tmp_path / "model", write_pairs(tmp_path / "pairs", 1), tmp_path / "out"
    CASES["kontext"].build().save_pretrained(model)
    saves, save = [], Accelerator.save_state

    def full(self: Accelerator, folder: str) -> None:
        saves.append(folder)
        save(self, folder)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")

    fixed = ["--side", "32", "--quiet", "--checkpoint-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full)
        assert main(command(model, data, out, *fixed, "--steps", "3")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2.partial"]
    assert main(command(model, data, out, *fixed, "--steps", "3", "--rank", "4")) == 2
    assert "checkpoint-1 must be of this model and LoRA" in capsys.readouterr().err
    assert main(command(model, data, out, *fixed, "--steps", "3")) == 0
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
