"""Every kind of call that a pipeline allows: references, sizes, batches, guidance, latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from tests.adapters.witnesses import GENERATION, witnessed
from tests.latents import CASES, FIRST, each_case
from tests.pipelines import SIZES, Case

LATENTS = [CASES["kontext"], CASES["klein_inpaint"]]


def check(case: Case, pipe: object, keep: float = 0.25, **request: object) -> sra.PatchHandle:
    """Run a sparse step: each reference keeps its share, at the layout that the pipeline's own arguments tell."""
    handle = sra.patch(pipe, sra.SparseRef("random", keep))
    with witnessed(pipe.transformer) as calls:  # type: ignore[attr-defined]
        latents = case.call(pipe, steps=1, **request)  # type: ignore[arg-type]
    assert torch.isfinite(torch.as_tensor(latents)).all()
    layout = handle.record.layout
    assert layout.text == calls[0].text
    assert layout.rows == calls[0].rows == GENERATION + sum(layout.sizes)
    assert layout.generation == ((sum(layout.sizes) if case.name == "klein_kv" else 0), GENERATION)
    assert handle.record.batch == len(calls[0].given["hidden_states"])
    counts = tuple(int(keep * size + 0.5) for size in layout.sizes)
    (step,) = handle.record.steps
    assert step.selection is not None
    assert step.selection.counts() == counts
    assert "kept" in handle.summary()
    handle.remove()
    return handle


@each_case()
def test_numbers_of_references(case: Case) -> None:
    pipe = case.build()
    for count in case.references:
        layout = check(case, pipe, references=count).record.layout
        assert len(layout.references) == count
        for reference, (width, height) in zip(layout.references, case.sizes, strict=False):
            assert reference.grid is not None
            if not case.name.startswith(("klein_inpaint", "kontext_inpaint", "qwen", "longcat")):  # these resize
                pixels = 4 if case.side == 32 else 8
                assert reference.grid == (height // pixels, width // pixels)


@each_case(lambda case: case.free)
def test_sizes_of_references(case: Case) -> None:
    """Taller than wide, wider than tall, and smaller than the output."""
    pipe = case.build()
    for sizes in ((64, 64),), ((64, 128),), ((128, 64),):
        (reference,) = check(case, pipe, references=1, sizes=sizes).record.layout.references
        assert reference.grid is not None
        ratio = reference.grid[0] / reference.grid[1]
        assert ratio == pytest.approx(sizes[0][1] / sizes[0][0], rel=0.25)


@each_case(lambda case: len(case.references) > 1 and case.name != "klein_inpaint")
def test_references_of_different_sizes_and_order(case: Case) -> None:
    """The second reference is found where the pipeline puts it, whichever size comes first."""
    pipe = case.build()
    for sizes in (SIZES, SIZES[::-1]):
        layout = check(case, pipe, references=3, sizes=sizes).record.layout
        shapes = [r.grid[0] > r.grid[1] for r in layout.references if r.grid is not None]
        assert shapes == [height > width for width, height in sizes]


@each_case()
def test_batches_and_images_per_prompt(case: Case) -> None:
    """Each of them alone, beside guidance where the pipeline takes it, and both at once without."""
    assert case.cfg or case.name in ("flux2", "klein_kv")  # distilled or embedded guidance: one call a step
    pipe = case.build()
    assert check(case, pipe, cfg=case.cfg, images_per_prompt=2).record.batch == 2
    if 2 in case.batch:
        assert check(case, pipe, cfg=case.cfg, batch=2).record.batch == 2
        assert check(case, pipe, batch=2, images_per_prompt=2).record.batch == 4
    elif case.cfg:
        assert check(case, pipe, images_per_prompt=2).record.batch == 2


@each_case()
def test_an_item_of_a_batch_keeps_the_same_tokens_as_the_others(case: Case) -> None:
    """One selection serves the batch: scores are averaged over its items, not taken from the first."""
    pipe = case.build()
    request = {"batch": 2} if 2 in case.batch else {"images_per_prompt": 2}
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.25))
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, steps=2, **request)
    assert handle.record.mass is not None
    rows = [call.reached["hidden_states"] for call in calls]
    given = [call.given["hidden_states"] for call in calls]
    selection = handle.record.steps[-1].selection
    assert selection is not None
    first = 0 if case.name == "klein_kv" else GENERATION
    if case.name == "klein_kv":
        assert rows[1].shape == given[1].shape
        return
    wanted = given[1].index_select(1, torch.cat([torch.arange(GENERATION), selection.indices + first]))
    assert torch.equal(rows[1], wanted)


@pytest.mark.parametrize("case", LATENTS, ids=lambda case: case.name)
@pytest.mark.parametrize("select", [sra.Edges(), sra.Saliency()], ids=lambda select: type(select).__name__)
def test_latents_have_no_pixels(case: Case, select: sra.Edges | sra.Saliency) -> None:
    """The selector says so, and the pipeline is as good as new; other selectors do not mind."""
    request = {"latents": True, "steps": 2}
    plain = case.dense(**request)
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef(select, 0.5))
    with pytest.raises(sra.PixelsUnavailableError, match=r"looks at pixels, and reference 0 has none.*on_latents"):
        case.call(pipe, **request)
    with pytest.raises(sra.SparseRefError, match="must have taken place"):
        handle.summary()
    case.call(pipe, steps=2)  # with pixels the same patch works
    assert handle.record.steps[-1].kind == "sparse"
    handle.remove()
    assert np.array_equal(case.call(pipe, **request), plain)
    for other in (sra.AttentionMass(), sra.Cosine(), sra.Grid(), type(select)(on_latents="use")):
        with sra.patched(pipe, sra.SparseRef(other, 0.5)) as handle:
            case.call(pipe, **request)
        assert handle.record.steps[-1].kind == "sparse"
        assert handle.record.pixels == [None]


@each_case(lambda case: case.text_to_image)
def test_without_references_the_pipeline_passes_through_bit_for_bit(case: Case) -> None:
    plain = case.dense(references=0, steps=2)
    pipe = case.build()
    handle = sra.patch(pipe, sra.ReCAST(task="subject"))
    assert np.array_equal(case.call(pipe, references=0, steps=2), plain)
    with pytest.raises(sra.SparseRefError, match="a run with reference images must have taken place"):
        handle.summary()
    sparse = case.call(pipe, steps=2)
    assert handle.record.steps[-1].kind in ("sparse", "cached")
    assert np.array_equal(case.call(pipe, references=0, steps=2), plain)
    assert not np.array_equal(sparse, plain)


@each_case()
def test_every_token_kept_is_bit_for_bit_the_unpatched_pipeline(case: Case) -> None:
    """By a floor and where attention was measured, under guidance of the most references; and by a share, plainly.

    Of the pipelines of one transformer the first has all of these, the others have one of the first two in turn.
    """
    grid, mass, floor = sra.SparseRef("grid", 1.0), sra.SparseRef("mass", 1.0), sra.SparseRef("edges", 0.3, floor=1.0)
    most = {"steps": 2, "cfg": case.cfg, "references": max(case.references)}
    pipe = case.build()
    runs: list[tuple[dict, tuple]] = [(most, (mass, floor)), ({"steps": 2}, (grid,))]
    if case.name not in FIRST:
        runs = [(most, ((mass, floor)[list(CASES).index(case.name) % 2],))]
    for request, configs in runs:
        for config in configs:
            with sra.patched(pipe, config):
                assert np.array_equal(case.call(pipe, **request), case.dense(**request))
    assert np.array_equal(case.call(pipe, **most), case.dense(**most))
