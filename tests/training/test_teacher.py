"""What a model predicted before its training is what that training may go by."""

from __future__ import annotations

import json

import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.training import loop
from sparse_ref_attn.training.batches import seeded
from sparse_ref_attn.training.loop import TrainConfig, train
from sparse_ref_attn.training.lora import add_lora
from sparse_ref_attn.training.teacher import Teacher
from tests.training.test_command import FEW
from tests.training.test_loop import SETTINGS, Pipe, batches, same


def call(seed=0):
    batch = batches(Pipe(), 0, 0, 1)
    arguments, _, noise = batch.noised(seeded(seed), 0.0, 1.0, None)
    return arguments, noise - batch.target


def trained(transformer):
    """As it is after steps of a training: what is trained is another."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
    return transformer


@pytest.mark.parametrize("setting", [None, sra.RandomDrop(0.25), sra.IsolateReferences()], ids=str)
@pytest.mark.parametrize("lora", [False, True])
def test_a_teacher_is_the_model_before_its_training(lora, setting):
    transformer, (arguments, _) = trained(Pipe().transformer.train()), call()
    wanted = transformer(**arguments)[0]
    if lora:
        add_lora(transformer, 2)
    handle = None if setting is None else sra.patch_for_training(transformer, setting)
    teacher = Teacher(transformer, handle)
    trained(transformer)
    learning = {name for name, p in transformer.named_parameters() if p.requires_grad}
    student = transformer(**arguments)[0]
    drawn = None if handle is None else handle.state_dict()
    told = teacher(arguments)
    assert torch.equal(told, wanted)
    assert not told.requires_grad
    assert not torch.allclose(student[:, :16], told[:, :16], atol=1e-3)
    assert {name for name, p in transformer.named_parameters() if p.requires_grad} == learning
    assert handle is None or handle.state_dict() == drawn
    if handle is None:
        assert torch.equal(transformer(**arguments)[0], student)
    else:
        transformer(**arguments)
        assert handle.state_dict() == {"draws": 2}


def test_the_loss_is_to_the_share_of_both():
    transformer = trained(Pipe().transformer)
    batch, config = batches(Pipe(), 0, 0, 1), TrainConfig(1, sigma_mean=0.0, sigma_std=1.0, distill=0.25)
    arguments, velocity = call()
    teacher = Teacher(transformer)
    trained(transformer)
    loss, _ = loop._loss(transformer, batch, config, seeded(0), False, teacher)
    wanted = transformer(**arguments)[0][:, :16] - (0.75 * velocity + 0.25 * teacher(arguments)[:, :16])
    torch.testing.assert_close(loss, wanted.square().mean())


def test_a_distilled_run_that_was_broken_off_goes_on_bit_for_bit(tmp_path):
    """By the weights that it began with, which a checkpoint does not have."""

    def run(folder, steps, share):
        pipe = Pipe()
        drop = sra.patch_for_training(pipe.transformer, sra.RandomDrop((0.2, 0.9)))
        train(pipe, batches, TrainConfig(steps, distill=share, **SETTINGS | {"decay": 0}), tmp_path / folder, drop=drop)
        return tmp_path / folder / f"step-{steps:06d}"

    whole = run("whole", 4, 1.0)
    run("broken", 2, 1.0)
    assert same(whole, run("broken", 4, 1.0))
    assert not same(whole, run("taught nothing", 4, 0.0))


@pytest.mark.usefixtures("narrow")
def test_the_command_distills_and_says_so(sprites, tmp_path):
    small = ["train", "--sprites", sprites, "--grid", "8", *FEW]
    assert main([*small, "--out", str(tmp_path), "--keep", "0.1-0.9", "--distill", "0.5"]) == 0
    said = json.loads((tmp_path / "transformer/sparse_ref_attn.json").read_text())
    assert said["train"]["distill"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--distill", "1.5"], "distill must lie in [0, 1], got 1.5"),
        (["--distill", "nan"], "distill must lie in [0, 1], got nan"),
        (["--distill", "1", "--vae"], "--distill trains a transformer, got --vae"),
        (["--distill", "1", "--selector"], "--distill trains a transformer, got --selector"),
    ],
)
def test_mistakes(arguments, words, sprites, tmp_path, capsys):
    assert main(["train", "--sprites", sprites, "--steps", "1", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
