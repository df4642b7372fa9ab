"""``sra train --selector``: masses are ReCAST's, the head learns them, and a stopped run gives the same head."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.run.profile import block_indices
from sparse_ref_attn.selection import References
from sparse_ref_attn.selection.head import Origin
from sparse_ref_attn.selection.stability import spearman
from sparse_ref_attn.toy.pipeline import toy_pipeline
from sparse_ref_attn.toy.scenes import scene
from sparse_ref_attn.toy.sprites import SUBJECTS, load_sprites
from sparse_ref_attn.toy.words import LENGTH
from sparse_ref_attn.training.batches import encode, seeded
from sparse_ref_attn.training.folder import FolderBatches
from sparse_ref_attn.training.masses import Masses, measure
from sparse_ref_attn.training.selector import SelectorConfig, fit, likeness, train_selector
from sparse_ref_attn.types import TokenLayout

KINDS = ["double"] * 2 + ["single"] * 4
SMALL = ["--grid", "8", "--batch", "2", "--updates", "6"]


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline()


def pictures(count: int, task: str, grid: int) -> tuple[Tensor, Tensor, list[str]]:
    """Answers, references (B, 3, H, W) from -1 to 1, and prompts of held-out subjects."""
    sprites = load_sprites(SUBJECTS, "held-out")
    drawn = [scene(sprites, (3, i), grid=grid, task=task, subjects=(i,), split="held-out") for i in range(count)]
    targets, references = (
        torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).contiguous() * 2 - 1
        for x in ([s.target for s in drawn], [s.references[0] for s in drawn])
    )
    return targets, references, [s.prompt for s in drawn]


def test_each_item_has_the_mass_that_recast_measures(pipe) -> None:
    """Of a batch of two, against a patched call of each alone."""
    batch = encode(pipe, *pictures(2, "place", 8), LENGTH)
    arguments, level, _ = batch.noised(seeded(1), 0.7, 1.3, None)
    found = measure(pipe.transformer, adapter_for(pipe.transformer), arguments)
    assert found.grids == ((8, 8),)
    assert torch.equal(found.tokens, batch.references)
    for i in range(2):
        own = {
            name: x[i : i + 1] if isinstance(x, Tensor) and not name.endswith("_ids") else x
            for name, x in arguments.items()
        }
        with sra.patched(pipe.transformer, sra.SparseRef("mass", 0.25)) as handle, torch.no_grad():
            handle.begin(steps=2)
            handle.step(0)
            pipe.transformer(**own)
            handle.step(1)
            pipe.transformer(**own)
            mass = handle.record.mass[0]
        torch.testing.assert_close(found.mass[i, 2:].mean(0), mass)  # of the single-stream blocks
    assert not torch.allclose(found.mass[0], found.mass[1])
    assert len(level) == 2


def test_the_shipped_head_ranks_held_out_subjects_better_than_saliency(pipe) -> None:
    """By rank correlation with what the dense model looks at."""
    targets, references, prompts = pictures(8, "place", 16)
    batch = encode(pipe, targets, references, prompts, LENGTH)
    arguments, _, _ = batch.noised(seeded(2), 0.7, 1.3, None)
    found = measure(pipe.transformer, adapter_for(pipe.transformer), arguments)
    blocks = block_indices(sra.Learned().head().origin.trained["config"]["blocks"], KINDS)
    layout = TokenLayout(512, 0, (0, 256), (sra.Reference(256, 256, (16, 16)),))
    likenesses = {
        type(select).__name__: np.mean(
            [
                spearman(select.score(References(layout, tokens[None], [photo[None]], prompt=prompt[None])), [mass])[0]
                for tokens, photo, prompt, mass in zip(
                    batch.references, references, found.prompt, found.share(blocks), strict=True
                )
            ]
        )
        for select in (sra.Learned(), sra.Saliency(), sra.Edges())
    }
    assert likenesses["Learned"] > max(likenesses["Saliency"], likenesses["Edges"]) + 0.1, likenesses
    assert likeness(sra.Learned().head(), [found], blocks) == pytest.approx(likenesses["Learned"], abs=1e-6)


def test_a_head_learns(tmp_path: Path) -> None:
    """Masses that follow from the tokens: after some updates the loss is a small part of what it was."""
    tokens = torch.randn(24, 4, 15, 6, generator=torch.Generator().manual_seed(0))
    measured = [
        Masses(x, torch.stack([x[..., 1], (2 * x[..., 0]).softmax(-1) * 0.3], 1), x[:, 0, :0], ((3, 3), (2, 3)))
        for x in tokens
    ]
    config = SelectorConfig(24, updates=60, lr=3e-2, channels=8)
    head = fit(measured, [1], config, Origin("M"), tmp_path)
    with (tmp_path / "log.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 60
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])
    assert head.origin.trained["rank_correlation"] > 0.9  # of the batches that were held back
    one, again = (
        fit(measured, [1], replace(config, updates=9), Origin("M"), tmp_path, tell=tell) for tell in (True, False)
    )
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in one.state_dict().items())


def test_a_run_that_was_stopped_gives_the_same_head(
    sprites: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(out: str, steps: int, *more: str) -> int:
        where = ["--sprites", sprites, "--out", str(tmp_path / out), "--steps", str(steps)]
        return main(["train", "--selector", *where, *SMALL, *more])

    assert train("once", 3) == 0
    assert train("twice", 1) == 0
    first = tmp_path / "twice/masses/000000.safetensors"
    made = first.stat().st_mtime_ns
    assert train("twice", 3) == 0
    assert first.stat().st_mtime_ns == made  # not measured again
    once, twice = ((tmp_path / out / "selector.safetensors").read_bytes() for out in ("once", "twice"))
    assert once == twice
    select = sra.Learned.load(tmp_path / "once/selector.safetensors")
    told = select.head().origin.trained
    assert (told["pairs"], told["grid"], told["config"]["updates"]) == (6, 8, 6)

    pipe = toy_pipeline()
    pipe.set_progress_bar_config(disable=True)
    handle = sra.patch(pipe, sra.SparseRef(select, 0.25))
    call = {"height": 64, "width": 64, "max_area": 64 * 64, "_auto_resize": False, "max_sequence_length": LENGTH}
    pipe(prompt="swap rows red to-blue", image=Image.new("RGB", (64, 64), "green"), num_inference_steps=2, **call)
    assert [(step.kind, step.kept) for step in handle.record.steps] == [("sparse", 16)] * 2  # no dense step
    handle.remove()

    assert train("twice", 3, "--blocks", "2,4") == 0  # fitted anew, nothing measured
    assert first.stat().st_mtime_ns == made
    assert (tmp_path / "twice/selector.safetensors").read_bytes() != once
    assert train("twice", 3, "--batch", "1") == 2
    assert "a run must go on as it began" in capsys.readouterr().err
    first.write_bytes(b"cut short")
    assert train("twice", 3) == 2
    assert "must be masses that sra train --selector measured" in capsys.readouterr().err


def test_a_pipeline_and_a_folder_of_pairs(tmp_path: Path) -> None:
    model, data, out = (tmp_path / name for name in ("model", "data", "out"))
    kontext_pipeline("tiny").save_pretrained(model)
    data.mkdir()
    Image.new("RGB", (40, 40), "red").save(data / "a.png")
    (data / "metadata.jsonl").write_text('{"reference": "a.png", "target": "a.png", "prompt": "the same"}')
    more = ["--side", "32", "--text-tokens", "32", "--steps", "1", "--batch", "2", "--updates", "2", "--blocks", "all"]
    assert main(["train", "--selector", "--model", str(model), "--data", str(data), "--out", str(out), *more]) == 0
    select = sra.Learned.load(out / "selector.safetensors")
    sra.patch(kontext_pipeline("tiny"), sra.SparseRef(select, 0.5, execute="both"))
    half = kontext_pipeline("tiny").to(torch.bfloat16)
    batches = FolderBatches(str(data), 2, side=32, text_tokens=32)
    head = train_selector(half, batches, SelectorConfig(1, updates=1, blocks="all"), tmp_path / "half")
    assert head.origin.weights != select.head().origin.weights
    with pytest.raises(sra.ConfigError, match="must be used with the model that it was trained for"):
        sra.patch(toy_pipeline(), sra.SparseRef(select, 0.5))


def test_settings_out_of_range() -> None:
    config = SelectorConfig(1, blocks=[2, 4])
    assert config.blocks == (2, 4)
    for name, value in (("steps", 0), ("updates", 1.5), ("lr", float("nan")), ("blocks", "some"), ("channels", 0)):
        with pytest.raises(sra.ConfigError, match=name):
            replace(config, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep", "0.5"], "--selector trains a selector alone, got --keep"),
        (["--vae"], "--selector trains a selector alone, got --vae"),
        (["--isolate"], "--isolate trains a transformer, got --selector"),
        (["--blocks", "some"], "must be single, double, all or blocks' numbers such as 2,4; got 'some'"),
        (["--blocks", "9"], "block indices must lie within this model's 6 blocks, got (9,)"),
        (["--init", "nowhere"], "must have a checkpoint, or be a transformer's folder, got nowhere"),
    ],
)
def test_mistakes(
    arguments: list[str], said: str, sprites: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--sprites", sprites, "--out", str(tmp_path / "out"), "--steps", "1"]
    assert main(["train", "--selector", *where, *SMALL, *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out/selector.safetensors").exists()


def test_what_belongs_to_a_selector(sprites: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--sprites", sprites, "--out", str(tmp_path), "--steps", "1", "--updates", "3"]
    assert main(arguments) == 2
    assert "--updates must come with --selector, got none" in capsys.readouterr().err
