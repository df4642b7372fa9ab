"""The tiny pipelines themselves: without this file's properties, tests that use them would prove nothing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pipelines import CASES, Case, record_calls

STEPS = 2


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_runs_and_repeats(case: Case) -> None:
    pipe = case.build()
    image = case.call(pipe, steps=STEPS)
    assert image.shape[0] == 1
    assert np.isfinite(image).all()
    assert ((image > 0) & (image < 1)).mean() > 0.9  # a saturated picture hides differences
    assert np.array_equal(image, case.call(pipe, steps=STEPS))
    assert np.array_equal(image, case.call(case.build(), steps=STEPS))


def test_depends_on_each_reference(case: Case) -> None:
    pipe = case.build()
    for count in case.references:
        image = case.call(pipe, references=count, steps=STEPS)
        other = case.call(pipe, references=count, steps=STEPS, first=7)
        assert np.abs(image - other).mean() > 1e-4, count


def test_guidance_doubles_the_calls(case: Case) -> None:
    if not case.cfg:
        pytest.skip("no classifier-free guidance")
    pipe = case.build()
    calls, remove = record_calls(pipe.transformer)
    plain = case.call(pipe, steps=STEPS)
    assert len(calls) == STEPS
    guided = case.call(pipe, steps=STEPS, cfg=True)
    assert len(calls) == 3 * STEPS
    remove()
    case.call(pipe, steps=STEPS)
    assert len(calls) == 3 * STEPS
    assert np.abs(plain - guided).mean() > 1e-4


def test_batches(case: Case) -> None:
    pipe = case.build()
    assert len(case.call(pipe, steps=1, images_per_prompt=2)) == 2
    for batch in case.batch:
        images = case.call(pipe, steps=1, batch=batch)
        assert len(images) == batch


def test_references_are_tokens_of_their_own_grid(case: Case) -> None:
    pipe = case.build()
    calls, _ = record_calls(pipe.transformer)
    for count in case.references:
        case.call(pipe, references=count, steps=1)
    rows = [call["hidden_states"][1] for call in calls]
    assert rows == sorted(set(rows))
    assert all(later - earlier >= 16 for earlier, later in zip(rows, rows[1:], strict=False))


def test_text_to_image(case: Case) -> None:
    if not case.text_to_image:
        pytest.skip("this pipeline demands an image")
    pipe = case.build()
    image = case.call(pipe, references=0, steps=STEPS)
    assert np.abs(image - case.call(pipe, steps=STEPS)).mean() > 1e-4
