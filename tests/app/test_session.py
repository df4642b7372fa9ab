"""A session is the library's own calls: patched, dense, undone, one after another."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.app.edit import Edit
from sparse_ref_attn.app.model import StoppedError
from sparse_ref_attn.app.session import Session
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.methods import methods
from sparse_ref_attn.pictures import open_image
from sparse_ref_attn.toy.calls import written
from sparse_ref_attn.toy.pipeline import toy_pipeline

STEPS = 3
KLEIN = {"max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3), "guidance_scale": 1.0}


@cache
def small_call(photo: str, prompt: str, config: sra.SparseRef | None) -> np.ndarray:
    pipe = toy_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if config is not None:
        sra.patch(pipe, config)
    arguments = written(prompt, open_image(photo), 128)
    return np.asarray(
        pipe(**arguments, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(5)).images[0]
    )


def test_an_edit_its_dense_run_and_the_way_back(session: Session, drawn: tuple[str, str]) -> None:
    photo, prompt = drawn
    heard: list[tuple[str, int, int]] = []
    asked = Edit((photo,), prompt, way="edges", share=0.3, steps=STEPS, seed=5)
    made = session.run(asked, lambda *told: heard.append(told))
    config = methods(0.3, ["edges"], seed=5)["edges"]
    assert np.array_equal(np.asarray(made.result.sparse_image), small_call(photo, prompt, config))
    assert heard == [("sparse", step + 1, STEPS) for step in range(STEPS)]
    assert session.status() == "The small trained model is loaded on cpu, patched with edges at 30 %."
    assert made.result.flop_ratio > 1
    assert made.result.bound_seconds is None
    assert made.overlay().width > made.overlay().height > 100

    both = session.dense(made)
    dense = small_call(photo, prompt, None)
    assert np.array_equal(np.asarray(both.result.dense_image), dense)
    assert not np.array_equal(np.asarray(both.result.sparse_image), dense)
    assert 0 < both.result.bound_seconds < both.result.dense.whole
    assert [row[0].strip() for row in both.rows()][1:] == [
        "whole call", "inside the transformer", "text encoders, VAE, rest", "reference tokens a step",
        "transformer work, TFLOP", "the bound of the whole call", "memory of this process, at most",
    ]  # fmt: skip
    assert not session.patched


def test_undo_is_the_pipeline_as_it_was(session: Session, drawn: tuple[str, str]) -> None:
    photo, prompt = drawn
    before = {name for name, value in vars(session.model.transformer).items() if callable(value)}
    session.run(Edit((photo,), prompt, share=0.5, steps=STEPS, seed=5))
    assert session.patched
    session.undo()
    assert {name for name, value in vars(session.model.transformer).items() if callable(value)} == before
    found = session.model.caller(session.model.arguments(Edit((photo,), prompt)), 5, lambda step, steps: None)(STEPS)
    assert np.array_equal(np.asarray(found), small_call(photo, prompt, None))


def test_edits_in_turn_on_one_model_and_what_is_stored(session: Session, drawn: tuple[str, str]) -> None:
    photo, prompt = drawn
    first = session.run(Edit((photo,), prompt, way="cache", share=0.25, steps=STEPS))
    second = session.run(Edit((photo,), prompt, way="ToMe", share=0.25, steps=STEPS))
    again = session.run(Edit((photo,), prompt, way="cache", share=0.25, steps=STEPS))
    assert np.array_equal(np.asarray(first.result.sparse_image), np.asarray(again.result.sparse_image))
    assert "stored keys and values" in [row[0] for row in first.rows()]
    assert second.overlay() is None  # it changes tokens, and chooses none
    assert "warms up" in " ".join(first.notes())
    assert "warms up" not in " ".join(second.notes())


def test_a_loaded_model_takes_two_photos(klein: Path, photos: tuple[str, str]) -> None:
    session = Session()
    session.load(str(klein), device="cpu", more=KLEIN)
    made = session.run(Edit(photos, "a cup", way="grid", share=0.5, steps=2, width=64, height=64))
    assert [r.grid for r in made.result.handle.record.layout.references] == [(12, 8), (12, 8)]
    assert made.result.sparse_image.size == (64, 64)


def test_a_run_that_is_stopped_leaves_the_model_as_it_was(session: Session, drawn: tuple[str, str]) -> None:
    photo, prompt = drawn
    steps: list[int] = []

    def told(what: str, step: int, total: int) -> None:
        steps.append(step)
        if step == 2:
            session.stop()

    with pytest.raises(StoppedError):
        session.run(Edit((photo,), prompt, way="edges", steps=STEPS), told)
    assert steps == [1, 2]
    assert not session.patched
    assert session.run(Edit((photo,), prompt, way="edges", steps=STEPS)).result.sparse_image.size == (128, 128)


def test_runs_wait_for_each_other(session: Session, drawn: tuple[str, str]) -> None:
    photo, prompt = drawn
    order: list[str] = []

    def one(name: str) -> None:
        session.run(Edit((photo,), prompt, way="grid", steps=STEPS), lambda *told: order.append(name))

    threads = [threading.Thread(target=one, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "".join(order) in ("a" * STEPS + "b" * STEPS, "b" * STEPS + "a" * STEPS)


def test_one_model_in_memory(session: Session, klein: Path, drawn: tuple[str, str]) -> None:
    before, made = session.model, session.run(Edit((drawn[0],), drawn[1], way="grid", steps=1))
    with pytest.raises(ConfigError, match=r"must hold model_index\.json"):
        session.load(str(klein.parent))
    assert session.model is before  # a name that is plainly wrong costs nothing
    session.load(str(klein), device="cpu")
    assert before.pipe is None
    assert session.status() == f"{klein} is loaded on cpu, as it is: no patch."
    with pytest.raises(ConfigError, match="must be on the model that made the picture"):
        session.dense(made)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": "place it on a beach"}, "knows the words of its own task alone, got it on a beach"),
        ({"width": 64}, "128 x 128 pixels alone"),
        ({"images": ("a.png", "b.png")}, "an image must be a file, got a.png, which does not exist"),
    ],
)
def test_what_the_small_model_does_not_take(
    session: Session, drawn: tuple[str, str], settings: dict, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        session.run(Edit(**{"images": (drawn[0],), "prompt": drawn[1]} | settings))
    assert not session.patched


def test_without_a_model_there_is_nothing_to_run(drawn: tuple[str, str]) -> None:
    session = Session()
    assert session.status() == "No model is loaded."
    with pytest.raises(ConfigError, match="there must be a model"):
        session.run(Edit((drawn[0],), drawn[1]))
