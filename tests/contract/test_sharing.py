"""Pipelines that share models, or nothing: patches reach as far as the transformer does, and no further."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.patching import pixels
from tests.contract import patched
from tests.contract.state import GRID, MASS, kinds, state, steps
from tests.pipelines import CASES

KLEIN, KONTEXT = CASES["klein"], CASES["kontext"]
EDGES, SALIENCY = sra.SparseRef("edges", 0.25), sra.SparseRef("saliency", 0.5)


@pytest.mark.parametrize(
    ("name", "other", "cls"),
    [
        ("kontext", "kontext_inpaint", diffusers.FluxKontextInpaintPipeline),
        ("klein", "klein_inpaint", diffusers.Flux2KleinInpaintPipeline),
    ],
)
def test_from_pipe_shares_the_patch(name: str, other: str, cls: type) -> None:
    case, inpaint = CASES[name], CASES[other]
    dense, wanted = inpaint.dense(), patched.picture(inpaint, EDGES)
    pipe = case.build()
    case.call(pipe, steps=1)
    before = state(pipe)
    handle = sra.patch(pipe, EDGES)
    second = cls.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    for _ in range(2):
        assert np.array_equal(wanted, inpaint.call(second))  # the pixels that the second pipeline encoded
        assert kinds(handle) == ["sparse"] * 3
        case.call(pipe)
        assert kinds(handle) == ["sparse"] * 3
    handle.remove()
    assert np.array_equal(dense, inpaint.call(second))
    assert state(pipe) == before


def test_text_to_image_from_pipe() -> None:
    pipe = KONTEXT.build()
    words: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "height": 32, "width": 32}
    words |= {"output_type": "np", "max_sequence_length": 32}
    second = diffusers.FluxPipeline.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    dense = second(**words, latents=_noise(second)).images
    handle = sra.patch(pipe, GRID)
    assert np.array_equal(dense, second(**words, latents=_noise(second)).images)
    KONTEXT.call(pipe)
    assert kinds(handle) == ["sparse"] * 3
    assert np.array_equal(dense, second(**words, latents=_noise(second)).images)


def _noise(pipe: Any) -> Any:
    return torch.randn(1, 64, pipe.transformer.config.in_channels, generator=torch.Generator().manual_seed(3))


@cache
def alone(cfg: bool, first: int) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """A run of a pipeline whose transformer alone is patched, and its steps."""
    pipe = KLEIN.build()
    witness = sra.patch(pipe.transformer, MASS)
    return KLEIN.call(pipe, steps=4, cfg=cfg, first=first), steps(witness)


@pytest.mark.parametrize(
    ("ran", "cfg"),
    [
        ("never", True), ("to its end", True), ("aborted", True), ("aborted after its second step", True),
        ("to its end", False), ("aborted", False),
    ],
)  # fmt: skip
def test_a_pipeline_with_another_scheduler(ran: str, cfg: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The patched pipeline's scheduler stands still, and knows neither step nor run of the other one.

    It was read all the same: every step was step 0, or the ranking of the last image was used again.
    """
    pipe = KLEIN.build()
    handle = sra.patch(pipe, MASS)
    second = diffusers.Flux2KleinPipeline.from_pipe(
        pipe, scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    )
    second.set_progress_bar_config(disable=True)
    last = {"never": -1, "to its end": 9, "aborted": 0, "aborted after its second step": 1}[ran]

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        if step == last:
            raise KeyboardInterrupt
        return kwargs

    if last == 9:
        KLEIN.call(pipe, steps=4, cfg=cfg)
    elif last >= 0:
        with pytest.raises(KeyboardInterrupt):
            KLEIN.call(pipe, steps=4, cfg=cfg, callback=stop)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        for first in (0 if last == 9 else 5, 9):  # 0 are the references of the run that ended
            image = KLEIN.call(second, steps=4, cfg=cfg, first=first)
            assert kinds(handle) == ["profile", "sparse", "sparse", "sparse"]
            wanted, ran_alone = alone(cfg, first)
            assert np.array_equal(image, wanted)
            assert steps(handle) == ran_alone
    own = [r for r in caplog.records if "another pipeline drives it" in r.message]
    assert len(own) == 1
    wanted, ran_alone = patched.run(KLEIN, MASS, steps=4, cfg=cfg)
    assert np.array_equal(KLEIN.call(pipe, steps=4, cfg=cfg), wanted)
    assert steps(handle) == ran_alone  # its own scheduler is read again
    assert handle.record.total_steps == 4


def test_a_pipeline_with_another_scheduler_and_the_same_references() -> None:
    """After a run that was broken off: its first step may pass for that run's next one, and then steps go on."""
    pipe = KLEIN.build()
    handle = sra.patch(pipe, MASS)
    second = diffusers.Flux2KleinPipeline.from_pipe(
        pipe, scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    )
    second.set_progress_bar_config(disable=True)

    def stop(*arguments: Any) -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        KLEIN.call(pipe, steps=4, callback=stop)
    KLEIN.call(second, steps=4)
    kept = [step.kept for step in handle.record.steps]
    assert kinds(handle)[0] == "profile"
    assert kept[1] < kept[2]


def test_two_pipelines_in_two_threads() -> None:
    wanted = {config: patched.picture(KLEIN, config, references=2, cfg=True) for config in (GRID, MASS)}
    pipes = {config: KLEIN.build() for config in wanted}
    handles = {config: sra.patch(pipe, config) for config, pipe in pipes.items()}

    def thrice(config: sra.SparseRef) -> list[np.ndarray]:
        return [KLEIN.call(pipes[config], references=2, cfg=True) for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        for config, images in zip(pipes, pool.map(thrice, pipes), strict=True):
            assert all(np.array_equal(wanted[config], image) for image in images)
    assert kinds(handles[GRID])[0] == "sparse"
    assert kinds(handles[MASS])[0] == "profile"
    handles[GRID].remove()
    assert np.array_equal(wanted[MASS], KLEIN.call(pipes[MASS], references=2, cfg=True))


def test_two_pipelines_with_one_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed in the order in which they were patched, the first one's wrapper stayed on the VAE."""
    pipes = [KLEIN.build(seed) for seed in (0, 1)]
    for pipe in pipes:
        KLEIN.call(pipe, steps=1)
    pipes[1].vae = pipes[0].vae
    before = [state(pipe) for pipe in pipes]
    for order in ((1, 0), (0, 1)):
        handles = [sra.patch(pipe, config) for pipe, config in zip(pipes, (EDGES, SALIENCY), strict=True)]
        for _ in range(2):
            for pipe, handle in zip(pipes, handles, strict=True):
                KLEIN.call(pipe, references=2, steps=2)
                assert kinds(handle) == ["sparse"] * 2
        if order == (0, 1):
            _fill(pipes[0], handles[1], monkeypatch)
        for i in order:
            handles[i].remove()
        assert [state(pipe) for pipe in pipes] == before, order
        assert "encode" not in vars(pipes[0].vae)


def _fill(pipe: Any, other: sra.PatchHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes what the other pipeline encodes: it must not pile up."""
    monkeypatch.setattr(pixels, "_HEARD", 4)
    for _ in range(6):
        KLEIN.call(pipe, references=1, steps=1)
    tap = other._generations.pixels
    assert tap is not None
    assert len(tap._seen) == 4
    monkeypatch.setattr(pixels, "_HEARD_BYTES", 3 * 3 * 64 * 96 * 4)
    KLEIN.call(pipe, references=1, steps=1)
    assert len(tap._seen) == 3


def test_patching_again_replaces() -> None:
    pipe = KLEIN.build()
    KLEIN.call(pipe, steps=1)
    before = state(pipe)
    first = sra.patch(pipe, MASS)
    once = len(pipe.transformer._forward_pre_hooks), len(pipe.transformer._forward_hooks)
    second = sra.patch(pipe, GRID)
    assert (len(pipe.transformer._forward_pre_hooks), len(pipe.transformer._forward_hooks)) == once
    KLEIN.call(pipe)
    assert kinds(second) == ["sparse"] * 3
    assert repr(first) == "PatchHandle(FLUX.2: removed)"
    first.remove()  # says nothing about the second
    KLEIN.call(pipe)
    assert kinds(second) == ["sparse"] * 3
    third = sra.patch(pipe.transformer, GRID)  # the same transformer
    assert len(pipe.transformer._forward_hooks) == once[1]
    assert "encode" not in vars(pipe.vae)
    third.remove()
    assert state(pipe) == before


def test_a_refused_patch_leaves_the_earlier_one() -> None:
    pipe = KLEIN.build()
    handle = sra.patch(pipe, GRID)
    before = state(pipe)
    with pytest.raises(sra.ConfigError, match="block indices must lie within this model's 4 blocks"):
        sra.patch(pipe, sra.SparseRef(sra.AttentionMass(blocks=(17,)), 0.5))
    assert state(pipe) == before
    KLEIN.call(pipe)
    assert kinds(handle) == ["sparse"] * 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_users_own_wrapper_of_encode(when: str) -> None:
    pipe = KLEIN.build()
    called = []

    def wrap() -> Any:
        inner = pipe.vae.encode

        def mine(*args: Any, **kwargs: Any) -> Any:
            called.append(1)
            return inner(*args, **kwargs)

        pipe.vae.encode = mine
        return mine

    mine = wrap() if when == "before" else None
    handle = sra.patch(pipe, EDGES)
    mine = mine or wrap()
    handle = sra.patch(pipe, EDGES)
    KLEIN.call(pipe, references=2)
    assert kinds(handle) == ["sparse"] * 3  # edges were seen
    assert len(called) == 2
    handle.remove()
    assert vars(pipe.vae)["encode"] is mine
    assert np.array_equal(KLEIN.call(pipe), KLEIN.dense())
    assert len(called) == 3
