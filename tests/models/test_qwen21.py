"""Qwen-Image-2.1, whose references stand between the words: what the steps read of its prefix, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparse_ref_attn as sra
from sparse_ref_attn.hooks.diffusers import attention_sites, tapped_attention
from tests.adapters.test_dropping import ROUNDING, error, noise, scores
from tests.contract.test_offload import by_model, sequential
from tests.models import qwen21
from tests.models.own_caches import Step, heard

KEEP = 0.25
SIZES = (60, 64)
TOKENS, GENERATION = sum(SIZES), 36
NOISE = sra.FromFunction(noise)
CALLS: dict[str, dict[str, Any]] = {"one": {}, "padded": {"batch": 2, "images": 2}, "guided": {"guided": True}}
called = pytest.mark.parametrize("which", CALLS.values(), ids=list(CALLS))


def steps_of(model: torch.nn.Module) -> AbstractContextManager[list[Step]]:
    """The calls inside."""
    whole: dict[int, Any] = {}

    def step(kwargs: dict[str, Any]) -> Step:
        given, cache = dict(kwargs), kwargs["kv_cache"]
        if kwargs["kv_cache_mode"] == "cached":
            given["kv_cache"] = whole.setdefault(id(cache), copy.deepcopy(cache))
        return Step(given, kwargs["kv_cache_mode"], torch.empty(0))

    return heard(model, step)


def by_hand(model: torch.nn.Module, step: Step, *kept: torch.Tensor) -> torch.Tensor:
    """The model, item by item, on a cache of its words and the tokens `kept`: of all layers, or of each its own."""
    given, outputs = step.given, []
    mask, shapes = given["img_mask"][0], given["img_shapes"]
    joint = mask.repeat_interleave(torch.where(mask, 4, 1))
    blocks, _ = model.build_token_metadata(joint, shapes[0])
    last, valid = len(shapes[0]) - 1, given["encoder_hidden_states_mask"]
    tokens = torch.cat([(blocks == block).nonzero()[:, 0] for block in range(last)])
    words = (blocks < 0).nonzero()[:, 0]
    for i in range(given["hidden_states"].shape[0]):
        seen = words if valid is None else words[valid[i].bool()[~mask[: valid.shape[1]]]]
        cache = copy.deepcopy(given["kv_cache"])
        for j, layer in enumerate(cache.layer_caches):
            rows = torch.cat([seen, tokens[kept[min(j, len(kept) - 1)]]])
            layer.store(layer.k[i : i + 1, rows], layer.v[i : i + 1, rows])
        own = {n: given[n][i : i + 1] for n in ("hidden_states", "encoder_hidden_states", "timestep")}
        outputs.append(model(**given | own | {"kv_cache": cache, "encoder_hidden_states_mask": None})[0])
    return torch.cat(outputs)


def run(setting: sra.SparseRef, **which: Any) -> tuple[Any, sra.RunRecord, list[Step]]:
    """The model without the patch, what the run with it recorded, and its calls."""
    pipe = qwen21.build()
    with sra.patched(pipe, setting) as handle, steps_of(pipe.transformer) as steps:
        qwen21.call(pipe, **which)
        return pipe.transformer, handle.record, steps


pictures = partial(qwen21.call, steps=2)


@pytest.mark.parametrize(
    ("which", "setting"),
    zip(CALLS.values(), (sra.SparseRef("mass", 1.0), sra.SparseRef("grid", 1.0, "cache"), "fast"), strict=True),
    ids=list(CALLS),
)
def test_the_pipeline_is_itself_with_every_token_and_after(which: dict[str, Any], setting: Any) -> None:
    pipe = qwen21.build()
    dense, alone = pictures(pipe, **which), pictures(pipe, sizes=())
    assert np.isfinite(dense).all()
    assert np.abs(dense - pictures(pipe, **which, sizes=())).max() > 0.01
    with sra.patched(pipe, setting) as handle:
        assert np.array_equal(pictures(pipe, **which), dense)
        record = handle.record
        assert (record.layout.generation, record.layout.sizes) == ((TOKENS, GENERATION), SIZES)
        assert [r.grid for r in record.layout.references] == [(6, 10), (8, 8)]
        assert all(pixels is not None for pixels in record.pixels)
        assert record.exactness == "exact"
        assert np.array_equal(pictures(pipe, sizes=()), alone)
    with sra.patched(pipe, sra.SparseRef("edges", KEEP)):
        sparse = pictures(pipe, **which)
        assert not np.array_equal(sparse, dense)
        assert not np.array_equal(pictures(pipe, **which, seed=5), sparse)
        assert np.array_equal(pictures(pipe, **which), sparse)
    assert np.array_equal(pictures(pipe, **which), dense)


@called
@pytest.mark.parametrize("execute", ["tokens", "cache", "both"])
@torch.no_grad()
def test_a_step_reads_the_words_and_the_kept_tokens(which: dict[str, Any], execute: str) -> None:
    model, record, steps = run(sra.SparseRef(NOISE, sra.Linear(0.1, 0.5), execute), **which)
    branches = 2 if which.get("guided") else 1
    assert [step.mode for step in steps] == ["extract"] * branches + ["cached"] * 2 * branches
    assert [made.kind for made in record.steps] == ["dense", "cached", "cached"]
    assert (record.steps[0].kept, len({made.kept for made in record.steps})) == (TOKENS, 3)
    best = [part.argsort()[::-1] for part in np.split(scores(SIZES), [SIZES[0]])]
    for i, step in enumerate(steps):
        want = model(
            **step.given | ({} if step.mode == "cached" else {"kv_cache": copy.deepcopy(step.given["kv_cache"])})
        )[0]
        if step.mode == "extract":
            assert torch.equal(step.sample, want)
            continue
        parts = record.steps[i // branches].selection.split()
        first, second = (np.sort(part[: len(own)]) for part, own in zip(best, parts, strict=True))
        kept = torch.from_numpy(np.concatenate([first, SIZES[0] + second]))
        assert error(step.sample, by_hand(model, step, kept)) < ROUNDING
        assert error(step.sample, want) > 10 * ROUNDING


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("which", [CALLS["one"], CALLS["padded"]], ids=["one", "padded"])
@torch.no_grad()
def test_the_ranking_is_by_the_mass_of_the_generations_attention(which: dict[str, Any], at: int) -> None:
    """In the step that stores, and in one that reads everything."""
    model, record, steps = run(sra.SparseRef(sra.AttentionMass("all", steps=(at,)), KEEP), **which)
    assert [made.kept for made in record.steps] == [TOKENS] * (at + 1) + [31] * (2 - at)
    masses, joint = [], record.layout.text + TOKENS + GENERATION
    starts = record.layout.places
    columns = torch.cat([torch.arange(p, p + n) for p, n in zip(starts, SIZES, strict=True)])

    def tap(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> None:
        assert (q.shape[1], k.shape[1]) == (GENERATION, joint)
        logits = torch.einsum("bqhc,bkhc->bhqk", q, k) / q.shape[-1] ** 0.5
        logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
        masses.append(logits.softmax(-1)[..., columns].mean((0, 1, 2)))

    names = ("hidden_states", "timestep")  # of the step that is measured, on the cache that the first filled
    given = steps[1].given | {name: steps[at].given[name] for name in names}
    with tapped_attention(attention_sites([(b.attn, "single") for b in model.transformer_blocks]), tap):
        model(**given)
    wanted = torch.stack(masses).mean(0)
    got = torch.cat([part.flatten() for part in record.mass])
    assert torch.allclose(got / got.sum(), wanted / wanted.sum(), atol=1e-5)
    kept = torch.cat([SIZES[0] * i + part.topk(round(n / 4)).indices
                      for i, (part, n) in enumerate(zip(wanted.split(SIZES), SIZES, strict=True))])  # fmt: skip
    assert error(steps[2].sample, by_hand(model, steps[2], kept.sort().values)) < ROUNDING


@torch.no_grad()
def test_layers_read_their_own_share_and_the_ranking_is_made_anew() -> None:
    model, record, steps = run(sra.SparseRef(NOISE, 0.5, sra.Cache(layers=(1.0, 0.5, 0.25))))
    assert record.steps[-1].layers == (62, 31, 16)
    best = [torch.from_numpy(part.argsort()[::-1].copy()) for part in np.split(scores(SIZES), [SIZES[0]])]
    layers = [torch.cat([best[0][:a], SIZES[0] + best[1][:b]]) for a, b in ((30, 32), (15, 16), (8, 8))]
    assert error(steps[-1].sample, by_hand(model, steps[-1], *layers)) < ROUNDING
    _, record, _ = run(sra.SparseRef(sra.AttentionMass("all"), KEEP, "cache", rerank_every=1))
    assert [again.step for again in record.stability] == [1]


@pytest.mark.parametrize("which", [CALLS["one"], CALLS["padded"]], ids=["one", "padded"])
def test_with_gradients_the_models_own_attention_reads_the_kept_rows(which: dict[str, Any]) -> None:
    pipe = qwen21.build()
    with steps_of(pipe.transformer) as steps:
        qwen21.call(pipe, steps=2, **which)
    cache = copy.deepcopy(steps[1].given["kv_cache"])
    with sra.patched(pipe.transformer, sra.SparseRef(NOISE, KEEP)) as handle:
        handle.begin(steps=2)
        with torch.no_grad():
            pipe.transformer(**steps[0].given | {"kv_cache": cache})
        handle.step(1)
        x = steps[1].given["hidden_states"].clone().requires_grad_()
        got = pipe.transformer(**steps[1].given | {"kv_cache": cache, "hidden_states": x})[0]
        kept = handle.record.steps[1].selection.indices
    assert got.requires_grad
    with torch.no_grad():
        assert error(got.detach(), by_hand(pipe.transformer, steps[1], kept)) < ROUNDING


@pytest.mark.parametrize("which", [CALLS["one"], {"batch": 2}], ids=["one", "padded"])
def test_the_work_is_what_the_counter_counts(which: dict[str, Any]) -> None:
    """But for the rows that a dense call brings and its model cuts off behind the first layers."""
    pipe, work = qwen21.build(), []
    for setting in (sra.SparseRef("grid", 1.0), sra.SparseRef("grid", KEEP)):
        counter = FlopCounterMode(display=False)
        with sra.patched(pipe, setting) as handle, counter, sdpa_kernel(SDPBackend.MATH):
            qwen21.call(pipe, **which)
        work.append(sum(counter.get_flop_counts()["QwenImage21Transformer2DModel"].values()) / 1e12)
        flops = handle.flops()
        assert flops.sparse_tflop == pytest.approx(work[-1], rel=0.03)
        assert flops.dense_tflop == pytest.approx(work[0], rel=0.03)
    assert work[1] < 0.97 * work[0]
    if not which:
        sizes = {"references": ((160, 96), (128, 128)), "output": (96, 96), "steps": 3}
        for execute in ("tokens", "cache"):
            setting = sra.SparseRef("grid", KEEP, execute)
            e = sra.estimate(pipe, setting, text_tokens=handle.record.layout.text, **sizes)
            assert (e.kinds, e.tokens) == (("dense", "cached", "cached"), (TOKENS, 31, 31))
            assert (e.dense.total / 1e12, e.sparse.total / 1e12) == pytest.approx(work, rel=0.03)


REFUSED: dict[str, tuple[Callable[[], sra.SparseRef], str]] = {
    "changed tokens": (lambda: sra.SparseRef(sra.ToMe(), KEEP), r"ToMe\(.*changes their tokens"),
    "their own attention": (lambda: sra.SparseRef("self-attention", KEEP), "SelfAttention.* their own attention"),
    "tiles": (lambda: sra.SparseRef("mass", KEEP, sra.Cache(per="tile")), 'per="tile" needs the text\'s own rows'),
    "by depth": (lambda: sra.SparseRef("grid", KEEP, from_block=1), "by depth some of their rows would leave"),
    "in flight": (lambda: sra.SparseRef("mass", KEEP, profile="in_flight"), "by depth some of their rows would"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_other_rows_is_refused(name: str) -> None:
    setting, words = REFUSED[name]
    with pytest.raises(
        sra.IncompatibleError, match="Qwen-Image-2.1: its references run among the words.*whole.*and " + words
    ):
        sra.patch(qwen21.build(), setting())


def test_calls_that_keep_nothing_and_keys_of_an_earlier_run_are_refused() -> None:
    pipe = qwen21.build()
    with sra.patched(pipe, sra.SparseRef("grid", KEEP)) as handle:
        with pytest.raises(sra.IncompatibleError, match=r"a call must keep them.*use_kv_cache=True"):
            qwen21.call(pipe, use_kv_cache=False)
        assert np.isfinite(qwen21.call(pipe, sizes=(), use_kv_cache=False)).all()
        with pytest.raises(sra.IncompatibleError, match="keys and values of an earlier run cannot stand in"):
            handle.capture()
    with steps_of(pipe.transformer) as steps:
        qwen21.call(pipe, steps=1)
    drop = sra.patch_for_training(pipe.transformer.train(), sra.RandomDrop(KEEP))
    with pytest.raises(sra.IncompatibleError, match="single tokens of them cannot be dropped there"):
        pipe.transformer(**steps[0].given)
    drop.remove()


@torch.no_grad()
def test_with_one_processor_for_all_layers_the_models_own_attention_reads_the_kept_rows() -> None:
    """As diffusers' page sets the one that is compiled; a rule that looks at attention must be able to tell layers."""
    pipe = qwen21.build()
    pipe.transformer.set_attn_processor(QwenImage21AttnProcessor())
    with sra.patched(pipe, sra.SparseRef(NOISE, KEEP)) as handle, steps_of(pipe.transformer) as steps:
        qwen21.call(pipe)
    kept = handle.record.steps[1].selection.indices
    assert error(steps[1].sample, by_hand(pipe.transformer, steps[1], kept)) < ROUNDING
    with pytest.raises(sra.IncompatibleError, match="a processor of its own, got one QwenImage21AttnProcessor for"):
        sra.patch(pipe, sra.SparseRef("mass", KEEP))


def test_the_rows_are_given_back_and_the_cache_is_smaller() -> None:
    _, record, _ = run(sra.SparseRef("grid", 0.05))
    held = [step.cache_bytes for step in record.steps]
    assert held[1] < held[0]
    assert prod((2, 3, 124, 2, 16, 4)) == record.dense_cache_bytes


@pytest.mark.parametrize("offload", [by_model, sequential])
def test_through_offload(offload: Callable[[Any], None]) -> None:
    wanted = []
    for prepare in (lambda pipe: None, offload):
        pipe = qwen21.build()
        prepare(pipe)
        with sra.patched(pipe, sra.SparseRef("mass", KEEP)):
            wanted.append(qwen21.call(pipe))
    assert np.array_equal(*wanted)
