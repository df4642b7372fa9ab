"""Masks of attention in `sra.batch`: each item's own, in the joined call or in one of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import sparse_ref_attn as sra
from tests.adapters.attention_masks import added, handed, padding, regions, text_of
from tests.adapters.test_dropping import KEEP
from tests.adapters.witnesses import GENERATION
from tests.contract.state import state
from tests.latents import CASES
from tests.pairwise import pairwise
from tests.pictures import generator, picture
from tests.pipelines import Case

models = pytest.mark.parametrize("name", ["kontext", "klein"])


def items(case: Case, maker: Callable[[int], Tensor]) -> tuple[list[str], list[list[Any]], list[dict[str, Any]]]:
    """Prompts, references and masks of two items; the second has another reference."""
    sizes = ((48, 32), (32, 32)) if case.side == 32 else ((64, 96), (64, 64))
    area = 16 if case.side == 32 else 64
    rows = [text_of(case) + GENERATION + w * h // area for w, h in sizes]
    each = [handed(case, maker(n)) for n in rows]
    return ["a cat", "two dogs"], [[picture(*size, 5 + i)] for i, size in enumerate(sizes)], each


def together_and_alone(case: Case, config: sra.SparseRef, maker: Callable[[int], Tensor], cfg: bool) -> tuple:
    pipe = case.build()
    prompts, images, each = items(case, maker)
    common: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": case.side, "width": case.side}
    if case.side == 32:
        common |= {"max_area": 32**2, "_auto_resize": False, "max_sequence_length": 32}
        common |= {"negative_prompt": "dark", "true_cfg_scale": 2.0} if cfg else {}
    else:
        common |= {"max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3), "guidance_scale": 3.0 if cfg else 1}
    alone = []
    for i, own in enumerate(each):
        with sra.patched(pipe, config):
            alone.append(pipe(prompt=prompts[i], image=images[i][0], generator=generator(i), **common, **own).images[0])
    plain = pipe(prompt=prompts[0], image=images[0][0], generator=generator(0), **common).images[0]
    before = state(pipe)
    done = sra.batch(
        pipe, prompts, images, config=config, generators=[generator(i) for i in range(2)], each=each, **common
    )
    assert state(pipe) == before
    return done, alone, plain


KINDS = {"bool": padding, "of 0 and -inf": lambda *shape: added(padding(*shape))}


@pairwise(
    name=["kontext", "klein"], cfg=[False, True], kind=KINDS,
    config=[sra.SparseRef("grid", 1.0), sra.SparseRef("grid", KEEP), sra.SparseRef("mass", KEEP)],
)  # fmt: skip
def test_items_of_a_batch_keep_their_own_masks_of_keys(
    name: str, cfg: bool, kind: Callable[..., Tensor], config: sra.SparseRef
) -> None:
    case = CASES[name]
    done, alone, plain = together_and_alone(case, config, lambda rows: kind(1, text_of(case), rows), cfg)
    np.testing.assert_allclose(done.images, alone, rtol=0, atol=2e-5)
    assert (done.joined, done.alone) == (4 if cfg else 2, 0)
    assert abs(alone[0] - plain).max() > 1e-2


@pytest.mark.parametrize("config", [sra.SparseRef("grid", KEEP), sra.SparseRef("mass", KEEP)])
@models
def test_items_of_a_batch_with_other_masks_run_by_themselves(name: str, config: sra.SparseRef) -> None:
    done, alone, _ = together_and_alone(CASES[name], config, regions, cfg=False)
    assert np.array_equal(done.images, alone)
    assert (done.joined, done.alone) == (0, 4)


@models
def test_one_mask_for_all_items_and_none_for_one(name: str) -> None:
    """The same mask for all, several pictures of an item, and an item without a mask beside one that has one."""
    case, config = CASES[name], sra.SparseRef("grid", KEEP)
    prompts, images, each = items(case, lambda rows: padding(1, text_of(case), rows))
    images[1] = images[0]
    common: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": case.side, "width": case.side}
    more = {"max_area": 32**2, "_auto_resize": False, "max_sequence_length": 32}
    more = more if case.side == 32 else {"max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)}
    common |= more | {"num_images_per_prompt": 2} | ({} if case.side == 32 else {"guidance_scale": 1.0})
    for own in ([each[0], each[0]], [each[0], {}]):
        pipe, alone = case.build(), []
        for i in range(2):
            with sra.patched(pipe, config):
                call = common | own[i]
                alone.append(pipe(prompt=prompts[i], image=images[i][0], generator=generator(i), **call).images)
        done = sra.batch(
            pipe, prompts, images, config=config, generators=[generator(i) for i in range(2)], each=own, **common
        )
        np.testing.assert_allclose([o.images for o in done.outputs], alone, rtol=0, atol=2e-5)
        assert done.joined == 2
