"""LTX-2: rows of the video leave with their times, places and masks, and the sound reads what the video reads."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.types import Reference
from tests.adapters.test_dropping import ROUNDING, error, noise, scores
from tests.adapters.witnesses import Attends, Call, best, witnessed
from tests.models import ltx2
from tests.models.other_pipelines import OTHERS

LTX2 = OTHERS["ltx2"]
SIZES, GENERATION, KEEP = (64, 16, 16), 128, 0.25
MASKED = {"conditioning_attention_strength": 0.5}
OWN_TIME = {"use_cross_timestep": False}


def called(pipe: Any, steps: int = 1, **more: Any) -> list[Call]:
    with witnessed(pipe.transformer) as calls:
        LTX2.call(pipe, steps=steps, **more)
    return calls


def removed_by_hand(given: dict[str, Any], kept: Tensor) -> tuple[dict[str, Any], Tensor]:
    rows = torch.cat([torch.arange(GENERATION), GENERATION + kept.nonzero().flatten()])
    mask = given["video_self_attention_mask"]
    return given | {
        "hidden_states": given["hidden_states"][:, rows],
        "timestep": given["timestep"][:, rows],
        "video_coords": given["video_coords"][:, :, rows],
        "video_self_attention_mask": None if mask is None else mask[:, rows][:, :, rows],
    }, rows


@pytest.mark.parametrize(
    ("rope", "more"),
    [("split", {}), ("interleaved", MASKED), ("interleaved", ltx2.GUIDED), ("split", MASKED | ltx2.GUIDED | OWN_TIME)],
    ids=["plain", "masked", "guided", "masked and guided, times by row"],
)
@torch.no_grad()
def test_dropping_is_the_call_without_the_rows(rope: str, more: dict[str, Any]) -> None:
    """Of the video and of the sound, bit for bit."""
    pipe = ltx2.build(rope_type=rope)
    model, guided = pipe.transformer, "stg_scale" in more
    kept = best(scores(SIZES), SIZES, KEEP)
    with sra.patched(pipe, sra.SparseRef(sra.FromFunction(noise), KEEP)):
        calls = called(pipe, **more)
    assert len(calls) == (3 if guided else 1)
    for call in calls:
        short, rows = removed_by_hand(call.given, kept)
        video, sound = model(**short)
        want = torch.zeros_like(call.given["hidden_states"]).index_copy_(1, rows, video)
        assert torch.equal(call.output[0], want)
        assert torch.equal(call.output[1], sound)


@torch.no_grad()
def test_leaving_in_the_last_block_is_that_block_without_the_rows() -> None:
    """What the references' rows give after it is zero, as where they never came in."""
    pipe = ltx2.build()
    model, kept = pipe.transformer, best(scores(SIZES), SIZES, KEEP)
    dense = called(pipe, **MASKED)[0]
    with sra.patched(pipe, sra.SparseRef(sra.FromFunction(noise), KEEP, from_block=2)):
        call = called(pipe, **MASKED)[0]
    with Unseen(kept, first=12):  # six in each of the two blocks before
        video, sound = model(**dense.given)
    assert error(call.output[0][:, :GENERATION], video[:, :GENERATION]) < ROUNDING
    assert error(call.output[1], sound) < ROUNDING
    assert not call.output[0][:, GENERATION:][:, ~kept].any()
    assert error(call.output[1], dense.output[1]) > 10 * ROUNDING


class Unseen(Attends):
    """From an attention on, dropped reference tokens are unseen; where the references' keys and values are those of
    `earlier` attention, by the others alone."""

    def __init__(self, kept: Tensor, first: int = 0, earlier: Call | None = None) -> None:
        self.kept, self.first, self.calls = kept, first, 0
        self.earlier = None if earlier is None else earlier.attention

    def attend(self, given: dict[str, Any]) -> Tensor:
        self.calls += 1
        queries, keys = given["query"].shape[2], given["key"].shape[2]
        if keys == GENERATION + len(self.kept) and self.calls > self.first:
            hidden = torch.zeros(queries, keys)
            blind = queries if self.earlier is None else min(queries, GENERATION)
            hidden[:blind, GENERATION:][:, ~self.kept] = -torch.inf
            mask = given.get("attn_mask")
            given["attn_mask"] = hidden if mask is None else mask + hidden
            for name, old in () if self.earlier is None else self._stored():
                own = given[name][:, :, :GENERATION]
                given[name] = torch.cat([own, old[:, GENERATION:].transpose(1, 2)], 2)
        return self.ask(**given)

    def _stored(self) -> list[tuple[str, Tensor]]:
        assert self.earlier is not None
        old = self.earlier[self.calls - 1]
        return [("key", old.k), ("value", old.v)]


@pytest.mark.parametrize("more", [{}, MASKED], ids=["plain", "masked"])
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_stored_references_are_read_by_video_and_sound(more: dict[str, Any], guided: bool) -> None:
    """The same call again, on what it stored: itself; on a part, itself with the others unseen. Guidance has calls in
    which a block does not attend, and in which the sound does not look."""
    pipe = ltx2.build()
    model, more = pipe.transformer, {**more, **(ltx2.GUIDED if guided else {})}
    calls, kept, part = called(pipe, **more), best(scores(SIZES), SIZES, KEEP), []
    given, dense = [call.given for call in calls], [call.output for call in calls]
    for call in calls:
        with Unseen(kept, earlier=call):
            part.append(model(**call.given))
    for share, wanted in ((1.0, dense), (KEEP, part)):
        config = sra.SparseRef(sra.FromFunction(noise), share, execute=sra.Cache(refresh=sra.Never(), first="all"))
        with sra.patched(model, config) as handle:
            handle.begin(steps=2)
            for step in range(2):
                handle.step(step)
                got = [model(**each) for each in given]
            assert [s.kind for s in handle.record.steps] == ["dense", "cached"]
            assert handle.record.steps[1].kept == round(share * sum(SIZES))
        for (video, sound), (want, heard) in zip(got, wanted, strict=True):
            assert error(video[:, :GENERATION], want[:, :GENERATION]) < ROUNDING
            assert error(sound, heard) < ROUNDING
    for (_, whole), (_, some), each in zip(dense, part, given, strict=True):
        assert (error(some, whole) > 10 * ROUNDING) == (not each["isolate_modalities"])


@torch.no_grad()
def test_sound_is_held_and_told() -> None:
    """Of each of three layers, keys and values of two heads of 16 channels, and of 8 for the sound."""
    pipe = ltx2.build()
    with sra.patched(pipe, sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Never()))) as handle:
        LTX2.call(pipe, steps=3)
        assert handle.record.dense_cache_bytes == 3 * 2 * sum(SIZES) * 2 * (16 + 8) * 4
        assert handle.record.steps[1].cache_bytes > handle.record.dense_cache_bytes  # and the rooms


@torch.no_grad()
def test_where_the_references_lie() -> None:
    pipe = ltx2.build()
    (call,) = called(pipe)
    adapter = adapter_for(pipe.transformer)
    layout = adapter.layout(call.given, adapter.find(call.given))
    assert layout.references == (Reference(128, 64, (8, 8)), Reference(192, 16, (4, 4)), Reference(208, 16, (4, 4)))
    assert (layout.text, layout.apart, adapter.grid(call.given, layout)) == (0, 24, (16, 8))
    bare = called(pipe, conditions=None, reference_conditions=None)[0].given
    assert adapter.find(bare) == ((0, 128), ())
    slots = torch.ones(1, call.rows, 1)
    assert adapter.find(call.given | {"video_keyframes_mask": slots}) is None


@torch.no_grad()
def test_keyframes_alone_are_references_of_the_condition_pipeline() -> None:
    pipe = ltx2.build(diffusers.LTX2ConditionPipeline)
    given = {n: v for n, v in ltx2.arguments(3).items() if not n.startswith("reference_")}
    given |= {"num_inference_steps": 2, "output_type": "np"}

    def frames() -> Any:
        return torch.from_numpy(pipe(**given, generator=torch.Generator().manual_seed(0)).frames)

    dense = frames()
    with sra.patched(pipe, sra.SparseRef("saliency", KEEP)) as handle:
        assert not torch.equal(frames(), dense)
        assert handle.record.layout.references == (Reference(128, 64, (8, 8)),)
    assert torch.equal(frames(), dense)


def test_a_model_of_larger_patches_is_refused() -> None:
    model = diffusers.LTX2VideoTransformer3DModel(
        patch_size=2, num_layers=1, num_attention_heads=1, attention_head_dim=12, cross_attention_dim=12,
        audio_num_attention_heads=1, audio_attention_head_dim=12, audio_cross_attention_dim=12,
    )  # fmt: skip
    with pytest.raises(sra.UnsupportedModelError, match=r"patch_size and patch_size_t 1\), got 2 and 1"):
        sra.patch(model, "sparse-context")


def test_all_calls_of_its_guidance_are_of_one_step() -> None:
    """The first is of two items, the others of one: their times by row have other shapes."""
    pipe = ltx2.build()
    with sra.patched(pipe, sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Never()))) as handle:
        LTX2.call(pipe, steps=3, **ltx2.GUIDED)
    assert [(step.kind, step.calls) for step in handle.record.steps] == [("dense", 3), ("cached", 3), ("cached", 3)]
