"""GLM-Image, whose references run before the steps: what a step reads of their keys and values, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparse_ref_attn as sra
from sparse_ref_attn.hooks.diffusers import attention_sites, tapped_attention
from tests.adapters.test_dropping import ROUNDING, error, noise, scores
from tests.contract.test_offload import by_model, sequential
from tests.models import glm_image
from tests.models.own_caches import Step, heard

KEEP = 0.25
SIZES = (32, 24)
TOKENS, GENERATION = sum(SIZES), 36
NOISE = sra.FromFunction(noise)
CALLS: dict[str, dict[str, Any]] = {"one": {}, "batch": {"batch": 2, "images": 2}, "guided": {"guided": True}}
called = pytest.mark.parametrize("which", CALLS.values(), ids=list(CALLS))


def steps_of(model: torch.nn.Module) -> AbstractContextManager[list[Step]]:
    """The calls of the steps inside."""
    whole: list[Any] = []

    def step(kwargs: dict[str, Any]) -> Step | None:
        mode = kwargs["kv_caches"][0].mode
        if mode == "write":
            return None
        whole.append(copy.deepcopy(whole[0] if whole else kwargs["kv_caches"]))
        whole[-1].set_mode(mode)
        return Step({**kwargs, "kv_caches": whole[-1]}, mode, torch.empty(0))

    return heard(model, step)


def by_hand(model: torch.nn.Module, step: Step, *kept: torch.Tensor) -> torch.Tensor:
    """The model on a cache of the tokens `kept` alone: of all layers, or of each its own."""
    cache = copy.deepcopy(step.given["kv_caches"])
    for i, layer in enumerate(cache.caches):
        rows = kept[min(i, len(kept) - 1)]
        layer.k_caches, layer.v_caches = ([x[:, rows] for x in held] for held in (layer.k_caches, layer.v_caches))
    return model(**step.given | {"kv_caches": cache})[0]


def masses(model: torch.nn.Module, step: Step) -> list[torch.Tensor]:
    """Mean attention (B, R) of the generation to each reference token, in each layer."""
    found = []

    def tap(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> None:
        weights = (torch.einsum("bqhc,bkhc->bhqk", q[:, -GENERATION:], k) / q.shape[-1] ** 0.5).softmax(-1)
        found.append(weights[..., :TOKENS].mean((1, 2)))

    with tapped_attention(attention_sites([(b.attn1, "double") for b in model.transformer_blocks]), tap):
        model(**step.given)
    return found


def kept_of(mass: torch.Tensor) -> torch.Tensor:
    """A quarter of each reference's tokens, those with the most mass (R,)."""
    parts = [part.topk(n // 4).indices.sort().values for part, n in zip(mass.split(SIZES), SIZES, strict=True)]
    return torch.cat([parts[0], SIZES[0] + parts[1]])


def run(setting: sra.SparseRef, **which: Any) -> tuple[Any, sra.RunRecord, list[Step]]:
    """The model without the patch, what the run with it recorded, and its calls."""
    pipe = glm_image.build()
    with sra.patched(pipe, setting) as handle, steps_of(pipe.transformer) as steps:
        glm_image.call(pipe, **which)
        return pipe.transformer, handle.record, steps


pictures = partial(glm_image.call, steps=2)


@pytest.mark.parametrize(
    ("which", "setting"),
    zip(CALLS.values(), (sra.SparseRef("mass", 1.0), sra.SparseRef("grid", 1.0, "cache"), "fast"), strict=True),
    ids=list(CALLS),
)
def test_the_pipeline_is_itself_with_every_token_and_after(which: dict[str, Any], setting: Any) -> None:
    pipe = glm_image.build()
    dense, alone = pictures(pipe, **which), pictures(pipe, sizes=())
    assert np.isfinite(dense).all()
    assert np.abs(dense - pictures(pipe, **which, sizes=())).max() > 0.01
    with sra.patched(pipe, setting) as handle:
        assert np.array_equal(pictures(pipe, **which), dense)
        record = handle.record
        assert (record.layout.generation, record.layout.sizes) == ((0, GENERATION), SIZES)
        assert [r.grid for r in record.layout.references] == [(4, 8), (6, 4)]
        assert all(pixels is not None for pixels in record.pixels)
        assert record.exactness == "exact"
        assert [s.calls for s in record.steps] == [1, 1]  # the guided call is without references
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
def test_a_step_reads_the_cache_without_the_dropped_tokens(which: dict[str, Any], execute: str) -> None:
    model, record, steps = run(sra.SparseRef(NOISE, sra.Linear(0.1, 0.5), execute), **which)
    read = [step for step in steps if step.mode == "read"]
    assert (len(read), len(steps)) == (3, 6 if which.get("guided") else 3)
    assert len({made.kept for made in record.steps}) == 3
    best = [part.argsort()[::-1] for part in np.split(scores(SIZES), [SIZES[0]])]
    for step, made in zip(read, record.steps, strict=True):
        first, second = (np.sort(part[: len(own)]) for part, own in zip(best, made.selection.split(), strict=True))
        kept = torch.from_numpy(np.concatenate([first, SIZES[0] + second]))
        assert (made.kind, made.kept) == ("cached", len(kept))
        assert error(step.sample, by_hand(model, step, kept)) < ROUNDING
        assert error(step.sample, model(**step.given)[0]) > 10 * ROUNDING
    for step in steps:
        if step.mode == "skip":
            assert torch.equal(step.sample, model(**step.given)[0])


@torch.no_grad()
def test_the_first_step_reads_everything_and_ranks_by_the_mass_of_its_attention() -> None:
    model, record, steps = run(sra.SparseRef(sra.AttentionMass("all"), KEEP))
    assert [made.kept for made in record.steps] == [TOKENS, 14, 14]
    assert torch.equal(steps[0].sample, model(**steps[0].given)[0])
    wanted = torch.stack(masses(model, steps[0])).mean(0)[0]
    got = torch.cat([part.flatten() for part in record.mass])
    assert torch.allclose(got / got.sum(), wanted / wanted.sum(), atol=1e-5)
    assert error(steps[1].sample, by_hand(model, steps[1], kept_of(wanted))) < ROUNDING


@pytest.mark.parametrize("which", [CALLS["one"], CALLS["batch"]], ids=["one", "batch"])
@torch.no_grad()
def test_a_tile_reads_its_own_tokens_in_each_layer(which: dict[str, Any]) -> None:
    """One tile of all of the generation: the text reads what it does. Items have tiles of their own."""
    way = sra.Cache(per="tile", tile=6, rest=None)
    model, record, steps = run(sra.SparseRef(sra.AttentionMass("all"), KEEP, way), **which)
    assert torch.equal(steps[0].sample, model(**steps[0].given)[0])
    layers = [record.tiles.reads[i][0].long()[:14].sort().values for i in range(3)]
    assert len({tuple(layer.tolist()) for layer in layers}) == 3
    assert all(torch.equal(a, kept_of(mass[0])) for a, mass in zip(layers, masses(model, steps[0]), strict=True))
    assert error(steps[-1].sample[:1], by_hand(model, steps[-1], *layers)[:1]) < ROUNDING


@torch.no_grad()
def test_layers_read_their_own_share_and_the_ranking_is_made_anew() -> None:
    model, record, steps = run(sra.SparseRef(NOISE, 0.5, sra.Cache(layers=(1.0, 0.5, 0.25))))
    assert record.steps[-1].layers == (28, 14, 7)
    best = [torch.from_numpy(part.argsort()[::-1].copy()) for part in np.split(scores(SIZES), [SIZES[0]])]
    layers = [torch.cat([best[0][:a], SIZES[0] + best[1][:b]]) for a, b in ((16, 12), (8, 6), (4, 3))]
    assert error(steps[-1].sample, by_hand(model, steps[-1], *layers)) < ROUNDING
    _, record, _ = run(sra.SparseRef(sra.AttentionMass("all"), KEEP, "cache", rerank_every=1))
    assert [again.step for again in record.stability] == [1]


def test_with_gradients_the_models_own_attention_reads_the_kept_rows() -> None:
    pipe = glm_image.build()
    with torch.no_grad():
        _, record, steps = run(sra.SparseRef(NOISE, KEEP))
    kept = record.steps[0].selection.indices
    wanted = by_hand(pipe.transformer, steps[0], kept)
    with sra.patched(pipe, sra.SparseRef(NOISE, KEEP)) as handle:
        filled(pipe, handle)
        given = pipe.transformer(**FILLED[-1] | {"hidden_states": steps[0].given["hidden_states"].requires_grad_()})[0]
    assert given.requires_grad
    assert error(given.detach(), wanted) < ROUNDING


FILLED: list[dict[str, Any]] = []


def filled(pipe: Any, handle: Any) -> None:
    """Leaves in `FILLED` the first call of a step, of a run that was broken off there."""

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["kv_caches"][0].mode == "read":
            FILLED.append(dict(kwargs))
            raise InterruptedError

    hook = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    with pytest.raises(InterruptedError):
        glm_image.call(pipe)
    hook.remove()
    if handle is not None:
        handle.begin(steps=2)


@torch.no_grad()
def test_caches_of_other_references_and_of_unseen_ones() -> None:
    """A cache that was filled without the patch is read as it is; one that a run has cut short begins no other."""
    pipe = glm_image.build()
    filled(pipe, None)
    unseen = FILLED.pop()
    wanted = pipe.transformer(**unseen)[0]
    with sra.patched(pipe, sra.SparseRef(NOISE, KEEP)) as handle:
        handle.begin(steps=2)
        assert torch.equal(pipe.transformer(**unseen)[0], wanted)
        with pytest.raises(sra.SparseRefError, match="a run with reference images must have taken place"):
            handle.record.steps  # noqa: B018
        filled(pipe, handle)
        known = FILLED.pop()
        assert not torch.equal(pipe.transformer(**known)[0], wanted)
        handle.step(1)
        pipe.transformer(**known)
        handle.begin(steps=2)
        with pytest.raises(sra.LayoutError, match="keys and values of all 56 reference tokens, got 14: an earlier run"):
            pipe.transformer(**known)


REFUSED: dict[str, tuple[Callable[[], sra.SparseRef], str]] = {
    "changed tokens": (lambda: sra.SparseRef(sra.ToMe(), KEEP), r"ToMe\(.*changes"),
    "their own attention": (
        lambda: sra.SparseRef("self-attention", KEEP),
        "SelfAttention.* measures their own attention",
    ),
    "by depth": (
        lambda: sra.SparseRef("grid", KEEP, from_block=1),
        "by depth some of their rows would leave at a block",
    ),
    "in flight": (lambda: sra.SparseRef("mass", KEEP, profile="in_flight"), "by depth some of their rows would leave"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_references_in_a_step_is_refused(name: str) -> None:
    setting, words = REFUSED[name]
    with pytest.raises(
        sra.IncompatibleError,
        match="GLM-Image: its references run before the steps, none of which has their rows, and " + words,
    ):
        sra.patch(glm_image.build(), setting())


def test_keys_of_an_earlier_run_are_refused() -> None:
    with sra.patched(glm_image.build(), sra.SparseRef("grid", KEEP)) as handle:
        for ask in (lambda: handle.capture(), lambda: handle.reuse(None), lambda: handle.reference_cache):
            with pytest.raises(
                sra.IncompatibleError, match="keys and values of an earlier run cannot stand in for them"
            ):
                ask()


def test_a_training_call_reads_what_was_drawn() -> None:
    pipe = glm_image.build()
    model = pipe.transformer.train()
    handle = sra.patch_for_training(model, sra.RandomDrop(KEEP))
    with torch.no_grad():
        filled(pipe, None)
    given = FILLED.pop()
    step = Step({**given, "kv_caches": copy.deepcopy(given["kv_caches"])}, "read", torch.empty(0))
    got = model(**given | {"hidden_states": given["hidden_states"].clone().requires_grad_()})[0]
    kept = handle.kept[0].indices
    handle.remove()
    assert got.requires_grad
    assert (len(kept), kept.max() < TOKENS) == (14, True)
    assert error(got.detach(), by_hand(model, step, kept)) < ROUNDING


@pytest.mark.parametrize("which", [CALLS["one"], CALLS["batch"]], ids=["one", "batch"])
def test_the_work_is_what_the_counter_counts(which: dict[str, Any]) -> None:
    pipe, work = glm_image.build(), []
    for setting in (sra.SparseRef("grid", 1.0), sra.SparseRef("grid", KEEP)):
        counter = FlopCounterMode(display=False)
        with sra.patched(pipe, setting) as handle, counter, sdpa_kernel(SDPBackend.MATH):
            pictures(pipe, **which)
        counted = sum(counter.get_flop_counts()["GlmImageTransformer2DModel"].values()) / 1e12
        work.append(counted)
        flops = handle.flops()
        assert flops.sparse_tflop == pytest.approx(counted, rel=1e-6)
        assert flops.dense_tflop == pytest.approx(work[0], rel=1e-6)
    assert work[1] < work[0]
    if not which:
        sizes = {"references": glm_image.SIZES, "output": (48, 48), "steps": 2, "pixels_per_token": glm_image.CELL}
        for execute in ("tokens", "cache"):
            setting = sra.SparseRef("grid", KEEP, execute)
            e = sra.estimate(pipe.transformer, setting, text_tokens=handle.record.layout.text, **sizes)
            assert (e.kinds, e.tokens) == (("cached",) * 2, (14,) * 2)
            assert (e.dense.total / 1e12, e.sparse.total / 1e12) == pytest.approx(work, rel=1e-6)


@pytest.mark.parametrize("offload", [by_model, sequential])
def test_through_offload(offload: Callable[[Any], None]) -> None:
    wanted = []
    for prepare in (lambda pipe: None, offload):
        pipe = glm_image.build()
        prepare(pipe)
        with sra.patched(pipe, sra.SparseRef("mass", KEEP)):
            wanted.append(glm_image.call(pipe))
    assert np.array_equal(*wanted)
