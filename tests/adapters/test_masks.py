"""A caller's attention mask: what is computed is what the model computes on the rows that are left, under that mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import sparse_ref_attn as sra
from tests.adapters.attention_masks import MASKS, by_hand, handed, padding, regions, rows_of, text_of
from tests.adapters.test_dropping import KEEP, ROUNDING, error, noise, scores
from tests.adapters.test_mass import close
from tests.adapters.witnesses import GENERATION, Call, best, hidden_keys, witnessed
from tests.contract.state import state
from tests.latents import CASES, each_case
from tests.pairwise import pairwise
from tests.pictures import mask as picture_mask
from tests.pictures import picture
from tests.pipelines import Case, small_pictures

HEADS = 2
KLEIN_KV_MASKS = (padding(1, 48, 208), regions(208), regions(112))
NAMES = ("kontext", "klein")
models = pytest.mark.parametrize("name", NAMES)
masked_cases = each_case(lambda case: case.name not in ("klein_kv", "longcat") and not case.name.startswith("qwen"))


def in_turn(masks: Iterable[str]) -> list[tuple[str, str]]:
    """Each mask with one of the two models; both meet each in `test_attention_is_measured_under_the_mask`."""
    return [(mask, NAMES[i % 2]) for i, mask in enumerate(masks)]


def run(
    case: Case, mask: str, config: sra.SparseRef, batch: int = 2, **request: Any
) -> tuple[list[Call], sra.PatchHandle]:
    """A run under a mask; the calls have it in whole, as the pipeline hands it on."""
    pipe = case.build()
    given = MASKS[mask](batch, HEADS, text_of(case), rows_of(case.name, batch))
    handle = sra.patch(pipe, config)
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, batch=batch, **handed(case, given), **request)
    return calls, handle


def joint(call: Call, kept: Tensor) -> Tensor:
    """Joint rows that are left of a call."""
    return torch.cat([torch.ones(call.text + GENERATION).bool(), kept]).nonzero().flatten()


def removed(call: Call, kept: Tensor) -> dict[str, Any]:
    """Arguments of a call without the rows that are not kept, cut by hand."""
    image = joint(call, kept)[call.text :] - call.text
    given = dict(call.given)
    given["hidden_states"], given["img_ids"] = given["hidden_states"][:, image], given["img_ids"][..., image, :]
    mask = given["joint_attention_kwargs"]["attention_mask"]
    return given | {"joint_attention_kwargs": {"attention_mask": by_hand(mask, joint(call, kept))}}


@pytest.mark.parametrize(("mask", "name"), in_turn(MASKS))
@torch.no_grad()
def test_rows_that_are_dropped_leave_the_mask_too(name: str, mask: str) -> None:
    """Bit for bit the model called by hand; and the mask matters."""
    case = CASES[name]
    calls, handle = run(case, mask, sra.SparseRef(sra.FromFunction(noise), KEEP), steps=1)
    sizes, fresh = handle.record.layout.sizes, case.model()
    kept = best(scores(sizes), sizes, KEEP)
    for call in calls:
        given = removed(call, kept)
        got = call.sample[:, joint(call, kept)[call.text :] - call.text]
        assert torch.equal(got, fresh(**given)[0])
        assert error(got, fresh(**given | {"joint_attention_kwargs": None})[0]) > 100 * ROUNDING


@masked_cases
@torch.no_grad()
def test_every_pipeline_and_guidance_in_sequence(case: Case) -> None:
    calls, handle = run(case, "(B, S)", sra.SparseRef(sra.FromFunction(noise), KEEP), steps=1, cfg=case.cfg)
    sizes, fresh = handle.record.layout.sizes, case.model()
    kept = best(scores(sizes), sizes, KEEP)
    assert len(calls) == 1 + case.cfg
    for call in calls:
        got = call.sample[:, joint(call, kept)[call.text :] - call.text]
        assert torch.equal(got, fresh(**removed(call, kept))[0])


@pairwise(
    name=["kontext", "klein"], block=[1, 3],
    mask=["(B, S)", "(1, 1, S)", "(S, S)", "(1, S, S)", "(H, S, S) added", "(B, H, S, S) added"],
)  # fmt: skip
@torch.no_grad()
def test_references_that_leave_by_depth(name: str, block: int, mask: str) -> None:
    case = CASES[name]
    config = sra.SparseRef(sra.FromFunction(noise), KEEP, from_block=block)
    calls, handle = run(case, mask, config, steps=1)
    sizes, fresh = handle.record.layout.sizes, case.model()
    kept = best(scores(sizes), sizes, KEEP)
    for call in calls:
        image = joint(call, kept)[call.text :] - call.text
        with hidden_keys(call, kept, from_block=block):
            wanted = fresh(**call.given)[0]
        assert error(call.sample[:, image], wanted[:, image]) < ROUNDING


@pairwise(mask=list(MASKS), name=NAMES, profile=["step", "in_flight"])
@torch.no_grad()
def test_attention_is_measured_under_the_mask(mask: str, name: str, profile: str) -> None:
    """In a profiling step, and in the first blocks of one from which references leave in flight."""
    case, in_flight = CASES[name], profile == "in_flight"
    blocks = {"profile_blocks": 2} if in_flight else {}
    config = sra.SparseRef(sra.AttentionMass(blocks=(0, 1)), KEEP, profile=profile, **blocks)
    calls, handle = run(case, mask, config, steps=2)
    call, record = calls[0], handle.record
    at = call.text + GENERATION
    wanted = [a.weights()[:, :, call.text : at, at:].mean((0, 1, 2)) for a in call.attention[:2]]
    close(torch.cat(record.mass), torch.stack(wanted).mean(0))
    assert record.scores is not None
    kept = best(torch.cat(record.scores).numpy(), record.layout.sizes, KEEP)
    fresh = case.model()
    later = calls if in_flight else calls[1:]
    for i, one in enumerate(later):
        image = joint(one, kept)[one.text :] - one.text
        with hidden_keys(one, kept, from_block=2 if in_flight and i == 0 else 0):
            expected = fresh(**one.given)[0]
        assert error(one.sample[:, image], expected[:, image]) < ROUNDING


@pytest.mark.parametrize("queries", ["generation", "reference"])
@models
def test_each_probe_has_the_masks_rows_of_its_queries(name: str, queries: str) -> None:
    case = CASES[name]
    own = queries == "reference"
    select = sra.SelfAttention(blocks=(0,)) if own else sra.AttentionMass(blocks=(0,), query_stride=3)
    for mask in ("(B, H, S, S) added", "(B, H, 1, S)"):
        calls, handle = run(case, mask, sra.SparseRef(select, KEEP), steps=2)
        call = calls[0]
        at = call.text + GENERATION
        rows = slice(at, None) if own else slice(call.text, at, 3)
        wanted = call.attention[0].weights()[:, :, rows, at:].mean((0, 1, 2))
        close(torch.cat(handle.record.scores), wanted)


@pytest.mark.parametrize("execute", ["tokens", "cache", "both"])
@pytest.mark.parametrize("select", ["grid", "mass"])
def test_a_model_that_reads_no_mask_beside_its_cache_reads_none_here(execute: str, select: str) -> None:
    """Klein-KV's attention that stores and reads reference K/V drops the caller's mask, and so does a patched one."""
    case = CASES["klein_kv"]
    pipe = case.build()
    with sra.patched(pipe, sra.SparseRef(select, 0.5, execute=execute)) as handle:
        plain = case.call(pipe, steps=2)
        assert handle.notes == []
        assert not np.array_equal(plain, case.dense(steps=2))
        for mask in KLEIN_KV_MASKS:
            assert np.array_equal(case.call(pipe, steps=2, **handed(case, mask)), plain)
            assert [note.partition(":")[0] for note in handle.notes] == ["the attention mask has no effect"]
        assert np.array_equal(case.call(pipe, steps=1, references=0), case.dense(steps=1, references=0))
        assert np.array_equal(case.call(pipe, steps=2), plain)
        assert handle.notes == []


def test_an_unpatched_model_reads_no_mask_beside_its_cache() -> None:
    case, pipe = CASES["klein_kv"], CASES["klein_kv"].build()
    for mask in KLEIN_KV_MASKS:
        assert np.array_equal(case.call(pipe, steps=2, **handed(case, mask)), case.dense(steps=2))


@pytest.mark.parametrize("config", [sra.SparseRef(sra.ToMe(), KEEP), sra.SparseRef(sra.Downscale("latents"), KEEP)])
@models
def test_changed_tokens_have_their_references_mask(name: str, config: sra.SparseRef) -> None:
    """A prompt's padding is honoured; a mask that tells tokens of a reference apart is refused."""
    case = CASES[name]
    pipe, text, rows = case.build(), text_of(case), rows_of(name)
    keys = torch.ones(1, rows, dtype=torch.bool)
    keys[:, text // 2 : text] = False
    hidden = keys & (torch.arange(rows) < text + GENERATION)
    with sra.patched(pipe, config), witnessed(pipe.transformer) as calls:
        case.call(pipe, steps=1, **handed(case, keys))
        case.call(pipe, steps=1, **handed(case, hidden[:, None, None] & keys[:, None, :, None]))
    fresh = case.model()
    for call, alike in zip(calls, (keys, hidden[:, None, None] & keys[:, None, :, None]), strict=True):
        short = call.reached
        left = short["hidden_states"].shape[1]
        assert left < rows - text
        mask = alike[..., : text + left]
        mask = mask[:, :, : text + left] if mask.ndim == 4 else mask
        with torch.no_grad():
            wanted = fresh(**short | {"joint_attention_kwargs": {"attention_mask": mask}})[0]
        assert torch.equal(call.sample[:, :GENERATION], wanted[:, :GENERATION])
    before = state(pipe)
    with (
        sra.patched(pipe, config),
        pytest.raises(sra.IncompatibleError, match="the same for all of them, got one that"),
    ):
        case.call(pipe, **handed(case, padding(1, text, rows)))
    assert state(pipe) == before


REFUSED: dict[str, tuple[Callable[[int, int], Any], type[Exception], str]] = {
    "too short": (lambda text, rows: torch.ones(1, 1, 1, rows - 1).bool(), sra.LayoutError, "joint rows .*, got"),
    "of the prompt alone": (lambda text, rows: torch.ones(1, text).bool(), sra.LayoutError, "joint rows .*, got"),
    "of another batch": (lambda text, rows: torch.ones(3, 1, 1, rows).bool(), sra.LayoutError, "1 items.*got"),
    "whole numbers": (lambda text, rows: torch.ones(1, rows).long(), sra.LayoutError, "bool, or floating.*int64"),
    "a block mask": (
        lambda text, rows: create_block_mask(lambda b, h, q, k: q >= k, 1, 1, rows, rows, device="cpu"),
        sra.IncompatibleError,
        "must be a tensor.*got a BlockMask",
    ),
}


@pytest.mark.parametrize(
    "config", [sra.SparseRef("grid", KEEP), sra.SparseRef("mass", KEEP), sra.SparseRef("grid", KEEP, from_block=1)]
)
@models
def test_what_is_no_mask_of_the_call_is_refused_by_name(name: str, config: sra.SparseRef) -> None:
    """Before anything runs; the patch then works on as if nothing had been."""
    case = CASES[name]
    pipe = case.build()
    with sra.patched(pipe, config) as handle:
        wanted = case.call(pipe, steps=2)
        before, steps = state(pipe), len(handle.record.steps)
        for what, (make, kind, words) in REFUSED.items():
            with pytest.raises(kind, match=words):
                case.call(pipe, **handed(case, make(text_of(case), rows_of(name))))
            assert state(pipe) == before, what
            assert len(handle.record.steps) == steps, what
        assert np.array_equal(case.call(pipe, steps=2), wanted)


@each_case(lambda case: case.name.startswith("qwen"))
def test_qwen_takes_its_own_mask_alone(case: Case) -> None:
    """Its attention refuses another; a batch, whose own rows go through that place, must not swallow it."""
    pipe, config = case.build(), sra.SparseRef("grid", KEEP)
    mask = handed(case, torch.ones(1, 200).bool())
    case.call(pipe, steps=1)  # some attributes exist from the first call on
    before = state(pipe)
    with (
        sra.patched(pipe, config),
        pytest.raises(sra.LayoutError, match=r"encoder_hidden_states_mask .* takes no other"),
    ):
        case.call(pipe, **mask)
    images = [[picture(64, 64, i)] for i in range(2)]
    common = {"num_inference_steps": 1, "height": 64, "width": 64, **mask}
    if case.name == "qwen_edit_inpaint":
        common["mask_image"] = picture_mask(64, 64)
    with small_pictures(), pytest.raises(sra.BatchError, match="takes no other"):
        sra.batch(pipe, ["a", "b"], images, config=config, **common)
    assert state(pipe) == before
