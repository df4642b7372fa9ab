"""Pipelines with calls of their own: what every other one is held to, on each of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.stream import reference_tokens
from sparse_ref_attn.errors import IncompatibleError
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.selection import Reduced
from tests.adapters.test_dropping import ROUNDING, error, noise, scores
from tests.adapters.witnesses import Call, HiddenKeys, best, witnessed
from tests.models.other_pipelines import OTHERS, Other

KEEP = 0.25
each = pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))


def seen_keys(other: Other, call: Call, kept: torch.Tensor) -> HiddenKeys:
    """Hides the reference tokens that are not kept, where they stand among others and where they stand alone."""
    if other.seen is not None:
        return HiddenKeys(other.seen(call.given, kept))
    rest = torch.ones(call.text + other.generation).bool()
    known = {len(kept): kept, len(rest) + len(kept): torch.cat([rest, kept])}
    if other.text_behind:
        known[len(rest) + len(kept)] = torch.cat([rest[: other.generation], kept, rest[: call.text]])
    if other.beside:  # a generation without text, and without references where it looks at those itself
        known = {other.generation + len(kept): torch.cat([rest[: other.generation], kept])}
    known |= {
        rows: torch.ones(rows).bool() for rows in (call.text, other.generation, *other.beside) if rows not in known
    }
    return HiddenKeys(known)


@cache
def dense_picture(name: str) -> np.ndarray:
    return OTHERS[name].call(OTHERS[name].build(), steps=2)


@cache
@torch.no_grad()
def first_call(name: str) -> Call:
    """Of a run of one step."""
    pipe = OTHERS[name].build()
    with witnessed(pipe.transformer) as calls:
        OTHERS[name].call(pipe, steps=1)
    return calls[0]


@each
def test_the_pipeline_is_itself_with_every_token_and_after(other: Other) -> None:
    pipe, dense = other.build(), dense_picture(other.name)
    assert np.isfinite(dense).all()
    with sra.patched(pipe, sra.SparseRef("mass", 1.0)) as handle:
        assert np.array_equal(other.call(pipe, steps=2), dense)
        layout = handle.record.layout
        assert layout.generation[1] == other.generation
        assert layout.generation[0] in (0, layout.reference_tokens)
        assert tuple(r.grid for r in layout.references) == other.references
    with sra.patched(pipe, sra.SparseRef("edges", KEEP)) as handle:
        assert not np.array_equal(other.call(pipe, steps=2), dense)
        assert handle.record.steps[-1].kept == sum(round(KEEP * r.length) for r in layout.references)
        flops = handle.flops()
        assert flops is not None
        assert flops.sparse_tflop < flops.dense_tflop
    assert np.array_equal(other.call(pipe, steps=2), dense)


@each
@torch.no_grad()
def test_dropping_is_the_dense_model_with_the_dropped_keys_masked(other: Other) -> None:
    """In every branch of guidance, where a pipeline takes any."""
    pipe = other.build()
    with sra.patched(pipe, sra.SparseRef(sra.FromFunction(noise), KEEP)) as handle:
        with witnessed(pipe.transformer) as calls:
            other.call(pipe, steps=1, **other.guided)
        sizes = handle.record.layout.sizes
    kept = best(scores(sizes), sizes, KEEP)
    for call in calls:
        with seen_keys(other, call, kept):
            wanted = other.generated(pipe.transformer(**call.given)[0], other.generation)
        assert error(other.generated(call.sample, other.generation), wanted) < ROUNDING
        dense = other.generated(pipe.transformer(**call.given)[0], other.generation)
        assert error(wanted, dense) > 10 * ROUNDING


FORMS: dict[str, Any] = {
    "run": sra.Cache(refresh=sra.Never()),
    "tile": sra.Cache(refresh=sra.Never(), per="tile", rest=None),
}


@each
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_cached_call_with_the_arguments_of_the_full_one_gives_its_output(other: Other, form: str) -> None:
    """What was stored is what the full call computed, and all of it is read."""
    given, model = first_call(other.name).given, other.build().transformer
    want = other.generated(model(**given)[0], other.generation)
    if form == "tile" and not other.tiles:
        with sra.patched(model, sra.SparseRef("mass", KEEP, FORMS[form])) as handle:
            handle.begin(steps=3)
            with pytest.raises(IncompatibleError, match='per="tile" ranks joint rows'):
                model(**given)
        return
    with sra.patched(model, sra.SparseRef("mass", 1.0, FORMS[form])) as handle:
        handle.begin(steps=2)
        for step in range(2):
            handle.step(step)
            got = other.generated(model(**given)[0], other.generation)
            assert error(got, want) < ROUNDING
        assert handle.record.steps[1].kind == "cached"
    with sra.patched(model, sra.SparseRef("mass", KEEP, FORMS[form])) as handle:
        handle.begin(steps=2)
        for step in range(2):
            handle.step(step)
            got = other.generated(model(**given)[0], other.generation)
        assert error(got, want) > 10 * ROUNDING


@each
def test_references_leave_by_depth(other: Other) -> None:
    """At the block where all leave, the others have run on all: another picture than where they left before."""
    pipe = other.build()
    adapter = adapter_for(pipe.transformer)
    last = len(adapter.blocks(pipe.transformer)) - 1
    pictures = []
    for at in (0, last):
        with sra.patched(pipe, sra.SparseRef("grid", KEEP, from_block=at)) as handle:
            pictures.append(other.call(pipe, steps=1))
            assert {s.kept for s in handle.record.steps} == {handle.record.steps[0].kept}
    assert np.isfinite(pictures).all()
    assert not np.array_equal(*pictures)
    with sra.patched(pipe, sra.SparseRef("grid", 1.0, from_block=last)):
        assert np.array_equal(other.call(pipe, steps=2), dense_picture(other.name))


@each
def test_changed_tokens_are_placed(other: Other) -> None:
    """Merging by nothing, each token to itself, is the model itself; by four it is a quarter of the tokens."""
    pipe = other.build()
    with sra.patched(pipe, sra.SparseRef(sra.ToMe(), KEEP)) as handle:
        assert not np.array_equal(other.call(pipe, steps=2), dense_picture(other.name))
        assert handle.record.steps[-1].kept == sum(round(KEEP * h * w) for h, w in other.references)


@torch.no_grad()
def test_flux3_references_alone_are_an_argument_that_may_be_missing() -> None:
    given = first_call("flux3").given | {"image_cond_hidden_states": None, "image_cond_ids": None}
    model = OTHERS["flux3"].build().transformer
    want = model(**given)[0]
    with sra.patched(model, sra.SparseRef("mass", KEEP)):
        assert torch.equal(model(**given)[0], want)


@torch.no_grad()
@each
def test_tokens_placed_at_their_own_cells_are_the_references(other: Other) -> None:
    """Whatever the units of a model's positions: the output is that of the call as it was."""
    model = other.build().transformer
    adapter = adapter_for(model)
    given = adapter.bind(model, (), first_call(other.name).given)
    layout = adapter.layout(given, adapter.find(given))
    parts = reference_tokens(adapter, given, layout).split(layout.sizes, 1)
    cells = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).float() for h, w in other.references]
    reduced = [Reduced(tokens, positions) for tokens, positions in zip(parts, cells, strict=True)]
    placed = adapter.replace(given, layout, reduced)
    for name in ("hidden_states", "img_ids", "image_cond_hidden_states", "image_cond_ids", "video_coords", "timestep"):
        if given.get(name) is not None:
            assert torch.allclose(placed[name].float(), given[name].float(), atol=1e-6)


@torch.no_grad()
def test_a_model_of_layers_must_be_told_of_them() -> None:
    model = OTHERS["qwen layered"].build().transformer
    with (
        sra.patched(model, sra.SparseRef("grid", KEEP)),
        pytest.raises(sra.LayoutError, match=r"must be given additional_t_cond, got None"),
    ):
        model(**first_call("qwen layered").given | {"additional_t_cond": None})
