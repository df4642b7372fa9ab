"""`sra.batch` on every pipeline: items of different references equal the items alone, and nothing is left behind."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from tests.contract.state import GRID, MASS, kinds, state
from tests.contract.test_offload import by_model, sequential
from tests.pictures import generator
from tests.pipeline_arguments import PROMPTS, Request
from tests.pipelines import CASES, Case, small_pictures

KEEP_ALL = sra.SparseContext(1.0, "grid")
SIZES = (((96, 64),), ((64, 64), (64, 96), (96, 64)), ((64, 96),))
FLUX_SIZES = (((48, 32),), ((32, 32),), ((32, 48),))


class Items:
    """The three items of a test: arguments for one call each, and for the batch."""

    def __init__(
        self, case: Case, pipe: Any, cfg: bool = False, none: bool = True, steps: int = 2, **more: Any
    ) -> None:
        many, self.pipe = max(case.references) > 1 and not case.name.endswith("inpaint"), pipe
        self.images, self.each = [], []
        for i, sizes in enumerate(FLUX_SIZES if case.side == 32 else SIZES):
            count = len(sizes) if many else 1
            if i == 2 and none and case.text_to_image:
                count = 0
            arguments = case.arguments(pipe, Request(count, 1, case.side, cfg, sizes, False, 10 * i))
            image = arguments.pop("image", None)
            self.images.append([] if image is None else image if isinstance(image, list) else [image])
            self.each.append(arguments)
        self.prompts = [None if "prompt_embeds" in own else p for own, p in zip(self.each, PROMPTS, strict=False)]
        for own in self.each:
            own.pop("prompt", None)
        sized = "height" in inspect.signature(type(pipe).__call__).parameters
        side = {"height": case.side, "width": case.side} if sized else {}
        self.common = {"num_inference_steps": steps, "output_type": "np", **side, **more}

    def alone(self, config: sra.SparseRef) -> tuple[list[np.ndarray], list[list[tuple[str, int]]]]:
        """Pictures and step records of the items one by one."""
        pictures, steps = [], []
        for i, images in enumerate(self.images):
            image = {} if not images else {"image": images[0] if len(images) == 1 else images}
            with sra.patched(self.pipe, config) as handle, small_pictures():
                call = {**self.common, **self.each[i], **image}
                pictures.append(self.pipe(prompt=self.prompts[i], generator=generator(i), **call).images[0])
                steps.append(record(handle) if images else [])
        return pictures, steps

    def together(self, config: sra.SparseRef | None, **more: Any) -> sra.BatchResult:
        with small_pictures():
            return sra.batch(
                self.pipe, self.prompts, self.images, config=config, generators=[generator(i) for i in range(3)],
                **{"each": self.each, **self.common, **more},
            )  # fmt: skip


def record(handle: sra.PatchHandle) -> list[tuple[str, int]]:
    return [(step.kind, step.kept) for step in handle.record.steps]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sparse_ref_attn item"]


def assert_close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for mine, alone in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, alone, rtol=0, atol=2e-5)


@cache
def as_built(name: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Pictures of the items one by one, and of a dense call, by a pipeline as it is built."""
    case = CASES[name]
    pipe = case.build()
    return Items(case, pipe).alone(MASS)[0], case.call(pipe, steps=2)


def combinations() -> Iterator[Any]:
    """Each case with attention mass, which measures with all tokens, and one case of each kind of transformer with
    another setting; one of them guided. FLUX.2 drops by the grid where items differ in their steps."""
    for i, case in enumerate(CASES.values()):
        name, other = (("dense", KEEP_ALL), ("grid", GRID))[i % 2]
        guided = i // 2 % 2 == 0
        yield pytest.param(case, MASS, guided, id=f"{case.name}-mass-{'guided' if guided else 'plain'}")
        if case.name in ("kontext", "klein", "klein_kv", "qwen_edit", "qwen_edit_plus", "longcat"):
            yield pytest.param(case, other, not guided, id=f"{case.name}-{name}-{'plain' if guided else 'guided'}")


@pytest.mark.parametrize(("case", "config", "cfg"), combinations())
def test_each_item_is_what_it_is_alone(case: Case, config: sra.SparseRef, cfg: bool) -> None:
    pipe = case.build()
    items = Items(case, pipe, cfg=cfg and case.cfg)
    want, steps = items.alone(config)
    before = state(pipe)
    done = items.together(config)
    assert state(pipe) == before
    assert_close(done.images, want)
    assert not np.allclose(want[0], want[1], atol=1e-2)
    assert [record(h) if images else [] for h, images in zip(done.handles, items.images, strict=True)] == steps
    calls = 2 * (2 if cfg and case.cfg else 1)
    assert (done.joined, done.alone) == ((0, 6) if case.name == "klein_kv" else (calls, 0))  # which keeps its K/V
    assert not threads()


def test_what_is_kept_is_each_items_own() -> None:
    case = CASES["klein"]
    items = Items(case, case.build(), steps=3)
    done = items.together(MASS)
    assert [len(h.record.layout.references) for h in done.handles[:2]] == [1, 3]
    assert kinds(done.handles[0]) == ["profile", "sparse", "sparse"]
    kept = [[step.kept for step in h.record.steps] for h in done.handles[:2]]
    assert kept[0][1] < kept[0][2] < kept[0][0] == 96
    assert kept[1][0] == 64 + 96 + 96
    assert done.handles[0].record.attention
    assert done.handles[1].ranking.scores[2].shape == (96,)
    lines = done.summary().splitlines()
    assert len(lines) == 5
    assert lines[1].split()[:3] == ["0", "1", "96"]
    assert lines[3].split()[:3] == ["2", "0", "0"]
    assert lines[4] == "transformer calls: 3 for several items at once (0% of their rows padding), 0 for one"
    assert "FLOP" in done.handles[1].summary()


def test_padding_is_told() -> None:
    case = CASES["kontext"]
    items = Items(case, case.build())
    done = items.together(sra.SparseRef("grid", 0.5))
    calls = [64 + kept + 32 for kept in (48, 32, 0)]  # 32 x 32 out, what is kept, the text
    assert done.padding == pytest.approx(1 - sum(calls) / (3 * max(calls)))


@pytest.mark.parametrize("name", ["klein", "kontext"])
def test_compiled_blocks(name: str) -> None:
    case = CASES[name]
    pipe = case.build(layers=1, single=1)
    items = Items(case, pipe)
    want, _ = items.alone(MASS)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    case.call(pipe)
    for _ in range(2):
        assert_close(items.together(MASS).images, want)


@pytest.mark.parametrize("execute", ["cache", "both"])
def test_klein_kv_with_its_cache(execute: str) -> None:
    case = CASES["klein_kv"]
    items = Items(case, case.build())
    config = sra.SparseRef("mass", 0.3, execute=execute)
    want, steps = items.alone(config)
    done = items.together(config)
    assert_close(done.images, want)
    assert [record(handle) for handle in done.handles[:2]] == steps[:2]


def test_two_batches_in_a_row_and_the_pipeline_after_them() -> None:
    case = CASES["kontext"]
    pipe, fresh = case.build(), case.build()
    items = Items(case, pipe, cfg=True)
    first, second = items.together(MASS), items.together(MASS)
    for a, b in zip(first.images, second.images, strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(case.call(pipe), case.call(fresh))


@pytest.mark.parametrize("name", ["klein", "flux2", "kontext", "qwen_edit_plus"])
def test_items_may_differ_in_steps_size_and_guidance(name: str) -> None:
    """An item that is done leaves; other timesteps and guidance scales are no obstacle."""
    case = CASES[name]
    pipe = case.build()
    items = Items(case, pipe)
    wide = 3 * case.side // 2
    items.each[1] |= {"num_inference_steps": 4}
    items.each[2] |= {"height": wide} | ({"max_area": wide * case.side} if name == "kontext" else {})
    if name != "qwen_edit_plus":
        items.each[0] |= {"guidance_scale": 7.0 if name != "klein" else 1.0}
    want, _ = items.alone(GRID)
    done = items.together(GRID)
    assert_close(done.images, want)
    assert [image.shape[0] for image in done.images] == [case.side, case.side, wide]
    assert len(done.handles[1].record.steps) == 4
    assert (done.joined, done.alone) == (2, 2)


def test_guidance_in_some_items_only() -> None:
    case = CASES["klein"]
    items = Items(case, case.build())
    items.each[1] |= {"guidance_scale": 3.0}
    want, _ = items.alone(MASS)
    assert_close(items.together(MASS).images, want)


def test_several_pictures_an_item() -> None:
    case = CASES["klein"]
    pipe = case.build()
    items = Items(case, pipe, num_images_per_prompt=2)
    with small_pictures(), sra.patched(pipe, MASS):
        want = pipe(
            prompt=PROMPTS[0], image=items.images[0][0], generator=generator(0), **items.common, **items.each[0]
        )
    done = items.together(MASS)
    assert len(done.images) == 6
    assert_close(done.images[:2], list(want.images))


def test_a_batch_of_one_is_the_call_itself() -> None:
    case = CASES["qwen_edit_plus"]
    pipe = case.build()
    items = Items(case, pipe)
    want, _ = as_built(case.name)
    with small_pictures():
        done = sra.batch(
            pipe, items.prompts[:1], items.images[:1], config=MASS, generators=[generator(0)], each=items.each[:1],
            **items.common,
        )  # fmt: skip
    assert np.array_equal(done.images[0], want[0])
    assert (done.joined, done.alone) == (0, 2)


def test_pixels_are_each_items_own() -> None:
    """The second item's reference comes as latents of the first one's grid: it has no pixels."""
    case = CASES["kontext"]
    pipe = case.build()
    items = Items(case, pipe)
    latents = case.arguments(pipe, Request(1, 1, 32, False, ((48, 32),), True, 0))["image"]
    items.images = [items.images[0], [latents], items.images[1]]
    done = items.together(GRID)
    assert [handle.record.pixels[0] is None for handle in done.handles] == [False, True, False]
    assert [tuple(h.record.pixels[0].shape[2:]) for h in done.handles[::2]] == [(32, 48), (32, 32)]


@pytest.mark.parametrize("name", ["kontext", "klein"])
def test_a_patch_on_the_pipeline_lends_its_settings_and_rests(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    items = Items(case, pipe)
    want, _ = as_built(name)
    handle = sra.patch(pipe, MASS)
    image = case.call(pipe, steps=2)
    steps = record(handle)
    done = items.together(None)
    assert_close(done.images, want)
    assert done.handles[0].config is MASS
    assert record(handle) == steps
    assert np.array_equal(case.call(pipe, steps=2), image)
    handle.remove()


@pytest.mark.parametrize(
    ("offload", "name"),
    [(by_model, "kontext"), (by_model, "klein_kv"), (sequential, "klein"), (sequential, "qwen_edit_plus")],
)
def test_through_offload(name: str, offload: Callable[[Any], None]) -> None:
    case = CASES[name]
    want, dense = as_built(name)
    pipe = case.build()
    items = Items(case, pipe)
    offload(pipe)
    for _ in range(2):
        assert_close(items.together(MASS).images, want)
        assert hasattr(pipe.transformer, "_hf_hook")
    assert np.array_equal(case.call(pipe, steps=2), dense)


def test_one_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["klein"]
    pipe = case.build()
    pipe.set_progress_bar_config(disable=False, mininterval=0, desc="batch")
    items = Items(case, pipe)
    items.each[1] |= {"num_inference_steps": 4}
    items.together(GRID)
    shown = [tuple(map(int, found)) for found in re.findall(r"(\d+)/(\d+)", capsys.readouterr().err)]
    assert shown == sorted(shown)  # with a bar an item, counts would begin anew
    assert shown[-1] == (4, 4)


def test_autocast_and_inference_mode_reach_the_items() -> None:
    case = CASES["kontext"]
    pipe = case.build()
    seen = []

    def note(pipe: Any, step: int, t: Any, kwargs: dict) -> dict:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return kwargs

    items = Items(case, pipe, callback_on_step_end=note)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        items.together(GRID)
    assert set(seen) == {(True, True, False)}
