"""The loop: resumable bit for bit, several processes, and words instead of half-written files."""

import csv
import itertools
import json
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparse_ref_attn.errors import ConfigError, LayoutError, NonFiniteError
from sparse_ref_attn.toy.pipeline import build_vae
from sparse_ref_attn.training import RandomDrop, checkpoint, loop, patch_for_training
from sparse_ref_attn.training.batches import Batch, seeded
from sparse_ref_attn.training.log import Log
from sparse_ref_attn.training.loop import TrainConfig, train
from sparse_ref_attn.training.lora import add_lora, save_lora
from sparse_ref_attn.training.vae import train_vae
from tests import programs
from tests.disk import largest_file
from tests.small_model import narrow_transformer

SETTINGS = {"warmup": 2, "decay": 2, "checkpoint_every": 2, "precision": "no"}
FILES = ("weights.safetensors", "ema.safetensors")


class Pipe:
    """What the loop needs of a pipeline whose batches are encoded already."""

    def __init__(self, seed=0):
        self.transformer = narrow_transformer(seed)

    def to(self, device):
        return self


def batches(pipe, step, process, processes):
    """Random latents: 16 generation tokens and 16 of a reference, in a 4 x 4 grid each."""
    config, random = pipe.transformer.config, seeded(7, step, process)

    def draw(*shape):
        return torch.randn(shape, generator=random)

    ids = torch.zeros(32, 3)
    ids[16:, 0] = 1
    ids[:, 1] = torch.arange(32) % 16 // 4
    ids[:, 2] = torch.arange(32) % 4
    d = config.in_channels
    return Batch(
        draw(2, 16, d), draw(2, 16, d),
        {
            "img_ids": ids, "encoder_hidden_states": draw(2, 3, config.joint_attention_dim),
            "pooled_projections": draw(2, config.pooled_projection_dim), "txt_ids": torch.zeros(3, 3),
        },
    )  # fmt: skip


def same(a, b):
    return all(
        torch.equal(left, right)
        for file in FILES
        for left, right in zip(load_file(a / file).values(), load_file(b / file).values(), strict=True)
    )


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    config = TrainConfig(steps=6, **SETTINGS)
    drop = RandomDrop((0.2, 0.9))
    whole = Pipe()
    train(whole, batches, config, tmp_path / "whole", drop=patch_for_training(whole.transformer, drop))
    broken = Pipe()

    def stops(pipe, step, process, processes):
        if step == 5:
            raise KeyboardInterrupt
        return batches(pipe, step, process, processes)

    with pytest.raises(KeyboardInterrupt):
        train(broken, stops, config, tmp_path / "parts", drop=patch_for_training(broken.transformer, drop))
    assert checkpoint.latest(tmp_path / "parts").name == "step-000004"
    other = Pipe(seed=1)  # all of it must come from the checkpoint
    train(other, batches, config, tmp_path / "parts", drop=patch_for_training(other.transformer, drop))
    assert same(tmp_path / "whole/step-000006", tmp_path / "parts/step-000006")
    rows = [list(csv.DictReader((tmp_path / run / "log.csv").open())) for run in ("whole", "parts")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert [row["step"] for row in rows[1]] == list("123456")


def test_a_run_that_goes_on_with_other_settings_says_which(tmp_path, caplog):
    train(Pipe(), batches, TrainConfig(steps=2, **SETTINGS), tmp_path)
    train(Pipe(), batches, TrainConfig(steps=3, **SETTINGS), tmp_path)
    assert "other settings" not in caplog.text
    train(Pipe(), batches, TrainConfig(steps=4, **SETTINGS | {"seed": 5, "lr": 0.25}), tmp_path)
    assert "step-000003 goes on with other settings" in caplog.text
    assert caplog.messages[-1].endswith("with: lr 0.002, now 0.25; seed 0, now 5")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1, "lr": float("nan")}, "lr must be above 0 and finite, got nan"),
        ({"steps": 1, "muon_lr": 0.0}, "muon_lr must be above 0"),
        ({"steps": 1, "ema": 1.0}, r"ema must lie in \[0, 1\), got 1.0"),
        ({"steps": 1, "reference_loss": -1.0}, "reference_loss must be at least 0 and finite, got -1.0"),
        ({"steps": 1, "precision": "fp8"}, "precision must be 'bf16' or 'no', got 'fp8'"),
    ],
)
def test_settings_outside_their_range(setting, said):
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**setting)


def test_the_loss_falls(tmp_path):
    def one(pipe, step, process, processes):
        return batches(pipe, 0, 0, 1)

    pipe = Pipe()
    little_noise = {"sigma_mean": -4.0}  # of which a narrow model can tell the picture
    train(pipe, one, TrainConfig(steps=40, warmup=5, precision="no", **little_noise), tmp_path)
    losses = [float(row["loss"]) for row in csv.DictReader((tmp_path / "log.csv").open())]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_nan_stops_with_words_and_leaves_the_checkpoint(tmp_path):
    def bad(pipe, step, process, processes):
        batch = batches(pipe, step, process, processes)
        if step == 4:
            batch.target[0, 0, 0] = float("nan")
        return batch

    with pytest.raises(NonFiniteError, match=r"must be finite, got nan at step 5; .*step-000004"):
        train(Pipe(), bad, TrainConfig(steps=6, **SETTINGS), tmp_path)
    assert checkpoint.latest(tmp_path).name == "step-000004"
    assert all(torch.isfinite(t).all() for f in FILES for t in load_file(tmp_path / "step-000004" / f).values())


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path):
    train(Pipe(), batches, TrainConfig(steps=2, **SETTINGS), tmp_path)
    pipe = Pipe(seed=1)
    pipe.transformer.proj_out = torch.nn.Linear(pipe.transformer.proj_out.in_features, 5)
    before = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    with pytest.raises(LayoutError, match=r"proj_out\.(bias|weight) of the model is"):
        train(pipe, batches, TrainConfig(steps=4, **SETTINGS), tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    train(Pipe(), batches, TrainConfig(steps=2, **SETTINGS), tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"checkpoint of step 4 must fit into .*No space left"):
        train(Pipe(), batches, TrainConfig(steps=4, **SETTINGS), tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["log.csv", "step-000002"]
    monkeypatch.undo()
    train(Pipe(), batches, TrainConfig(steps=4, **SETTINGS), tmp_path)
    assert checkpoint.latest(tmp_path).name == "step-000004"


def test_every_file_is_whole_or_absent_when_the_room_runs_out(tmp_path):
    train(Pipe(), batches, TrainConfig(steps=2, **SETTINGS), tmp_path)
    with largest_file(100_000), pytest.raises(ConfigError, match="the checkpoint of step 4 must fit into"):
        train(Pipe(), batches, TrainConfig(steps=4, **SETTINGS), tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["log.csv", "step-000002"]


def test_a_log_that_does_not_fit_leaves_the_earlier_one(tmp_path):
    log = Log(tmp_path, 0)
    log.add(1, {"loss": 1.0})
    log.write()
    log.add(2, {"loss": 2.0})
    with largest_file(10), pytest.raises(ConfigError, match=r"log\.csv must fit into"):
        log.write()
    assert log.path.read_text().split() == ["step,loss", "1,1"]


def test_a_lora_that_does_not_fit_leaves_the_earlier_one(tmp_path):
    pipe = _kontext()
    add_lora(pipe.transformer, 2)
    weights = {name: p for name, p in pipe.transformer.named_parameters() if p.requires_grad}
    path = save_lora(pipe, tmp_path, weights, None)
    before = path.read_bytes()
    with largest_file(1000), pytest.raises(ConfigError, match="the LoRA must fit into"):
        save_lora(pipe, tmp_path, {name: p + 1 for name, p in weights.items()}, None)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_run_goes_on_as_it_began(tmp_path):
    pipe = Pipe()
    train(pipe, batches, TrainConfig(steps=2, **SETTINGS), tmp_path)
    drop = patch_for_training(pipe.transformer, RandomDrop((0.2, 0.9)))
    with pytest.raises(ConfigError, match="was trained without dropping, and this run is with it"):
        train(pipe, batches, TrainConfig(steps=4, **SETTINGS), tmp_path, drop=drop)
    drop.remove()
    with pytest.raises(ConfigError, match=r"the same optimizers \(muon_lr\)"):
        train(Pipe(), batches, TrainConfig(steps=4, muon_lr=None, **SETTINGS), tmp_path)


def test_an_autoencoder_goes_on_bit_for_bit(tmp_path):
    def pictures(step):
        if step == stop:
            raise KeyboardInterrupt
        return torch.rand(1, 3, 16, 16, generator=seeded(step)) * 2 - 1

    settings, stop = {"steps": 5, "checkpoint_every": 2}, None
    alone, whole, parts = build_vae(0), build_vae(0), build_vae(0)
    train_vae(alone, pictures, steps=5)
    train_vae(whole, pictures, out=tmp_path / "whole", **settings)
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        train_vae(parts, pictures, out=tmp_path / "parts", **settings)
    assert checkpoint.latest(tmp_path / "parts").name == "step-000002"
    stop, parts = None, build_vae(1)
    train_vae(parts, pictures, out=tmp_path / "parts", **settings)
    for name, p in whole.named_parameters():
        assert torch.equal(p, dict(parts.named_parameters())[name])
        assert torch.equal(p, dict(alone.named_parameters())[name])
    assert parts.config.scaling_factor == whole.config.scaling_factor
    with pytest.raises(LayoutError, match="must have the model's own parameters"):
        train(Pipe(), batches, TrainConfig(steps=8, **SETTINGS), tmp_path / "parts")


def test_a_kept_reference_row_learns_the_same_with_dropping_and_without():
    """Dropped rows add to the reference loss a constant without gradient: a drop run and its control share one loss."""
    n, rows = 16, torch.arange(16, 32, 3)
    batch = batches(Pipe(), 0, 0, 1)
    config = TrainConfig(steps=1, reference_loss=0.3)

    def gradient(kept):
        output = torch.ones(2, 32, batch.target.shape[-1], requires_grad=True)

        def model(**kwargs):
            mask = torch.zeros(32, 1)
            mask[:n], mask[kept] = 1, 1
            return (output * mask,)

        with_subjects = replace(batch, subjects=batch.references)
        loop._loss(model, with_subjects, config, seeded(0), False)[0].backward()
        return output.grad

    every, some = gradient(torch.arange(16, 32)), gradient(rows)
    assert torch.equal(every[:, :n], some[:, :n])
    assert torch.equal(every[:, rows], some[:, rows])
    assert every[:, rows].abs().min() > 0
    dropped = [i for i in range(16, 32) if i not in rows]
    assert not some[:, dropped].any()


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(Pipe(), batches, TrainConfig(steps=2, **SETTINGS), tmp_path)
    for name in ("optimizer.pt", "weights.safetensors"):
        file = tmp_path / "step-000002" / name
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ConfigError, match=r"step-000002 must be a whole checkpoint"):
            train(Pipe(), batches, TrainConfig(steps=4, **SETTINGS), tmp_path)


def eight_steps(out, wait=False):
    """With `wait` it is slow enough to be killed, and never comes to its end."""

    def slow(pipe, step, process, processes):
        if wait:
            time.sleep(0.2 if step < 5 else 600)
        return batches(pipe, step, process, processes)

    train(Pipe(), slow, TrainConfig(steps=8, **SETTINGS), out)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """SIGKILL at any moment: what is there is whole, and the end is that of a run that nobody killed."""
    process = programs.start(eight_steps, tmp_path / "killed", True, log=tmp_path / "log")
    while checkpoint.latest(tmp_path / "killed") is None:
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for name in ("killed", "whole"):
        programs.run(eight_steps, tmp_path / name, log=tmp_path / "log")
    assert same(tmp_path / "whole/step-000008", tmp_path / "killed/step-000008")


PER_PAIR = ("encoder_hidden_states", "pooled_projections")


def changed(batch, change, *others):
    """A batch whose tensors with an entry a pair are `change` of its own and the others'."""
    target, references = (change(*(getattr(x, name) for x in (batch, *others))) for name in ("target", "references"))
    own = {name: change(*(x.arguments[name] for x in (batch, *others))) for name in PER_PAIR}
    return replace(batch, target=target, references=references, arguments=batch.arguments | own)


def test_two_processes_are_one_with_twice_the_batch(tmp_path, monkeypatch):
    """Gradients are averaged: two gloo processes make the steps of one whose batch is both of theirs."""
    programs.run_pair(eight_steps, tmp_path / "two", folder=tmp_path, ACCELERATE_USE_CPU="true")

    def both(pipe, step, process, processes):
        one, two = (batches(pipe, step, i, 2) for i in range(2))
        return changed(one, lambda *x: torch.cat(x), two)

    steps, alone = itertools.count(), loop._loss

    def noise_of_each(model, batch, config, random, guided, teacher):
        """The two processes draw noise of their own."""
        step = next(steps)
        halves = (changed(batch, lambda x, i=i: x.chunk(2)[i]) for i in range(2))
        return sum(alone(model, half, config, seeded(0, step, i), guided)[0] for i, half in enumerate(halves)) / 2, {}

    monkeypatch.setattr(loop, "_loss", noise_of_each)
    pipe = Pipe()
    train(pipe, both, TrainConfig(steps=8, **SETTINGS), tmp_path / "one")
    one = {name: p.detach() for name, p in pipe.transformer.named_parameters()}
    two = load_file(tmp_path / "two/step-000008/weights.safetensors")
    moved = max((one[name] - p).abs().max().item() for name, p in Pipe().transformer.named_parameters())
    assert moved > 1e-3
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-2 * moved


def test_lora_has_the_drop_in_its_metadata(tmp_path):
    pipe = _kontext()
    add_lora(pipe.transformer, 2)
    drop = patch_for_training(pipe.transformer, RandomDrop((0.2, 0.9)))
    ema = train(pipe, batches, TrainConfig(steps=2, muon_lr=None, **SETTINGS), tmp_path, drop=drop)
    drop.remove()
    path = save_lora(pipe, tmp_path, ema, drop.drop)
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["sparse_ref_attn"])
    assert RandomDrop.from_dict(said["random_drop"]) == RandomDrop((0.2, 0.9))
    again = _kontext()
    again.load_lora_weights(tmp_path)
    trained = {n: p for n, p in again.transformer.named_parameters() if "lora" in n}
    assert len(trained) == len(ema)
    for name, p in trained.items():
        assert torch.equal(p, ema[name.replace(".default_0.", ".default.")])
    assert sum(p.abs().sum() for n, p in trained.items() if "lora_B" in n) > 0


def _kontext():
    from sparse_ref_attn.eval.embedded import kontext_pipeline

    return kontext_pipeline("tiny")
