"""The tiny pipelines themselves: without this file's properties, tests that use them would prove nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests.pipelines import CASES, Case, each_case, record_calls

STEPS = 2
OUTPUT_TOKENS = 64  # of every case at its default side


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


@each_case()
def test_runs_and_repeats(case: Case) -> None:
    pipe = case.build()
    image = case.call(pipe, steps=STEPS)
    assert image.shape == (1, case.side, case.side, 3)
    assert ((image > 0) & (image < 1)).mean() > 0.9  # a saturated picture would hide differences
    assert np.array_equal(image, case.call(pipe, steps=STEPS))
    assert np.array_equal(image, case.dense(steps=STEPS))  # of another build
    assert difference(image, case.call(case.build(seed=1), steps=STEPS)) > 1e-2


@each_case()
def test_depends_on_the_references(case: Case) -> None:
    """And each of them is tokens of its own grid."""
    pipe = case.build()
    calls, _ = record_calls(pipe.transformer)
    *fewer, most = case.references
    for count in fewer:
        case.call(pipe, references=count, steps=1)
    image = case.call(pipe, references=most, steps=STEPS, first=7)
    assert difference(image, case.dense(references=most, steps=STEPS)) > 1e-4
    rows = [OUTPUT_TOKENS, *(call["hidden_states"][1] for call in calls[: len(case.references)])]
    assert all(later - earlier >= 16 for earlier, later in pairwise(rows))


@each_case()
def test_depends_on_single_reference_tokens(case: Case) -> None:
    """Not only through the text encoder or the VAE: the first or last reference token, set to zero, is seen."""

    def blank(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = kwargs["hidden_states"].clone()
        references_first = case.name == "klein_kv"
        references = hidden[:, :-OUTPUT_TOKENS] if references_first else hidden[:, OUTPUT_TOKENS:]
        if references.shape[1]:  # klein_kv's later steps have none
            references[:, row] = 0
        return args, kwargs | {"hidden_states": hidden}

    pipe = case.build()
    pipe.transformer.register_forward_pre_hook(blank, with_kwargs=True)
    call = {"references": max(case.references), "steps": STEPS}
    for row in (0, -1):
        assert difference(case.call(pipe, **call), case.dense(**call)) > 1e-5, row


@each_case(lambda case: case.free)
def test_size_of_a_reference(case: Case) -> None:
    pipe = case.build()
    calls, _ = record_calls(pipe.transformer)
    for sizes in (case.sizes[:1], [(64, 64)]):
        case.call(pipe, steps=1, sizes=sizes)
    pixels = 4 if case.side == 32 else 8
    rows = [call["hidden_states"][1] - OUTPUT_TOKENS for call in calls]
    assert rows == [w * h // pixels**2 for w, h in (case.sizes[0], (64, 64))]


@each_case(lambda case: case.cfg)
def test_guidance_doubles_the_calls(case: Case) -> None:
    pipe = case.build()
    calls, remove = record_calls(pipe.transformer)
    plain = case.call(pipe, steps=1)
    assert len(calls) == 1
    guided = case.call(pipe, steps=1, cfg=True)
    assert len(calls) == 3
    remove()
    case.call(pipe, steps=1)
    assert len(calls) == 3
    assert difference(plain, guided) > 1e-4


@each_case(lambda case: case.name.startswith("qwen"))
def test_qwen_prompts_are_masked(case: Case) -> None:
    masks = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["encoder_hidden_states_mask"])

    pipe = case.build()
    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    case.call(pipe, steps=1, cfg=True)
    assert [int((mask == 0).sum()) for mask in masks] == [2, 2]
    assert masks[0].shape != masks[1].shape  # the two branches' prompts differ in length
    if 2 in case.batch:
        case.call(pipe, steps=1, batch=2)
        short, long = (masks[-1] == 0).sum(dim=1).tolist()
        assert short > long > 0


@each_case()
def test_batches(case: Case) -> None:
    pipe = case.build()
    several = case.call(pipe, steps=1, images_per_prompt=2)
    assert len(several) == 2
    assert difference(several[0], several[1]) > 1e-3
    for batch in case.batch[1:]:
        assert len(case.call(pipe, steps=1, batch=batch)) == batch


@each_case(lambda case: case.latents)
def test_latents(case: Case) -> None:
    pipe = case.build()
    image = case.call(pipe, steps=STEPS, latents=True)
    assert difference(image, case.call(pipe, steps=STEPS, latents=True, first=7)) > 1e-4


@each_case(lambda case: case.text_to_image)
def test_text_to_image(case: Case) -> None:
    pipe = case.build()
    image = case.call(pipe, references=0, steps=STEPS)
    assert difference(image, case.dense(steps=STEPS)) > 1e-4


@each_case()
def test_other_shapes(case: Case) -> None:
    pipe = case.build(layers=1, single=3, heads=1, head_dim=32)
    assert pipe.transformer.config.num_layers == 1
    assert pipe.transformer.config.get("num_single_layers", 3) == 3
    assert case.call(pipe, steps=1).shape == (1, case.side, case.side, 3)


def test_refuses_what_the_pipeline_cannot_do() -> None:
    case = CASES["qwen_edit_plus"]
    with pytest.raises(ValueError, match=r"takes \(1,\) prompts, got 2"):
        case.call(case.build(), batch=2)
    with pytest.raises(ValueError, match=r"takes \(1, 2, 3\) references, got 0"):
        case.call(case.build(), references=0)
