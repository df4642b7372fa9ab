"""Z-Image-Omni, against its forward with the dropped tokens taken out of its lists by hand."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.errors import IncompatibleError
from sparse_ref_attn.hooks.instance_method import InstanceMethod
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.selection import Reduced, Reducer, References
from tests.adapters.test_dropping import ROUNDING, error, noise, scores
from tests.adapters.witnesses import Call, HiddenKeys, best, sample_of, witnessed
from tests.models import zimage
from tests.models.other_pipelines import OTHERS
from tests.pictures import picture

KEEP = 0.3
OMNI = OTHERS["z-image omni"]


def two() -> dict[str, Any]:
    """Two guided items; the pipeline writes into its lists of prompts."""
    prompts = {"prompt": ["a cat", "two dogs beside a red kite"], "negative_prompt": ["dark and blurry " * 4, "rain"]}
    return {**prompts, "guidance_scale": 3.0}


class ByHand(diffusers.ZImageTransformer2DModel):
    """Runs without those rows of each item's pictures that do not stay."""

    stay: list[list[bool]]

    def patchify_and_embed_omni(self, *args: Any) -> tuple[Any, ...]:
        made = super().patchify_and_embed_omni(*args)
        for i, stay in enumerate(self.stay):
            for rows in (made[0], made[4], made[7]):  # rows, positions, which of them are padding
                rows[i] = rows[i][torch.tensor(stay)]
            made[11][i] = [mark for mark, stays in zip(made[11][i], stay, strict=True) if stays]
            made[10][i] = (made[10][i][0], made[10][i][0] + sum(stay))
        return made

    def unpatchify(self, x: Any, size: Any, patch: int, frames: int, spans: Any) -> list[Tensor]:
        made = []
        for rows, (*_, (_, height, width)), (_, end) in zip(x, size, spans, strict=True):
            tokens = height * width // 4
            own = rows[end - zimage.padded(tokens) :][:tokens].unflatten(1, (4, -1)).permute(2, 1, 0)
            made.append(torch.nn.functional.fold(own.reshape(1, -1, tokens), (height, width), 2, stride=2)[0, :, None])
        return made


def by_hand(given: dict[str, Any], kept: Tensor) -> Tensor:
    model = OMNI.build().transformer
    model.__class__ = ByHand
    model.stay = [zimage.stays(given, kept, item) for item in range(len(given["x"]))]
    return sample_of(model(**given))


def calls_of(pipe: Any, **more: Any) -> list[Call]:
    with witnessed(pipe.transformer) as calls:
        OMNI.call(pipe, **{"steps": 1} | more)
    return calls


@pytest.mark.parametrize(("more", "items"), [({}, 1), (OMNI.guided, 2), (two(), 4)])
@torch.no_grad()
def test_dropping_is_the_forward_without_these_rows_bit_for_bit(more: dict[str, Any], items: int) -> None:
    pipe = OMNI.build()
    with sra.patched(pipe, sra.SparseRef(sra.FromFunction(noise), KEEP)) as handle:
        (call,) = calls_of(pipe, **more)
        sizes = handle.record.layout.sizes
    kept = best(scores(sizes), sizes, KEEP)
    assert len(call.given["x"]) == items
    assert torch.equal(call.sample, by_hand(call.given, kept))
    assert error(call.sample, sample_of(pipe.transformer(**call.given))) > 100 * ROUNDING


@pytest.mark.parametrize("first", [1, 2])
@torch.no_grad()
def test_guided_items_leave_by_depth_where_each_has_words_of_its_own(first: int) -> None:
    """All leave at a block: the keys that are hidden from there on, after the blocks of words and features."""
    pipe = OMNI.build()
    with sra.patched(pipe, sra.SparseRef(sra.FromFunction(noise), KEEP, from_block=first)) as handle:
        (call,) = calls_of(pipe, **two())
        sizes = handle.record.layout.sizes
    kept = best(scores(sizes), sizes, KEEP)
    with HiddenKeys(zimage.seen(call.given, kept), 2 + first):
        want = sample_of(pipe.transformer(**call.given))
    assert error(call.sample, want) < ROUNDING


@torch.no_grad()
def test_what_guided_items_store_is_what_their_full_call_computed() -> None:
    pipe = OMNI.build()
    (call,) = calls_of(pipe, **two())
    assert len({zimage.words(call.given, item) for item in range(4)}) > 1
    with sra.patched(pipe.transformer, sra.SparseRef("mass", 1.0, sra.Cache(refresh=sra.Never()))) as handle:
        handle.begin(steps=2)
        for step in range(2):
            handle.step(step)
            assert error(sample_of(pipe.transformer(**call.given)), call.sample) < ROUNDING
        assert handle.record.steps[1].kind == "cached"
        assert handle.record.exactness == "fixed time"


@pytest.mark.parametrize("blocks", ["single", (0,)])
@torch.no_grad()
def test_mass_is_what_the_generation_pays_in_the_blocks_asked_for(blocks: Any) -> None:
    """Of the whole softmax in float64, of items with words of their own; the first block sees no words."""
    pipe = OMNI.build()
    with sra.patched(pipe, sra.SparseRef(sra.AttentionMass(blocks), KEEP)) as handle:
        call = calls_of(pipe, steps=2, **two())[0]
        found, size = torch.cat(handle.record.mass or []), handle.record.layout.reference_tokens
    rows = torch.tensor([at for at, (_, token) in enumerate(zimage.pictures_rows(call.given, 0)) if token])
    layers = call.attention[3:] if blocks == "single" else call.attention[:1]
    total = []
    for item in range(4):
        at = rows + (zimage.words(call.given, item) if blocks == "single" else 0)
        total += [layer.weights()[item].mean(0)[at[size:]][:, at[:size]].mean(0) for layer in layers]
    assert torch.allclose(found.double(), torch.stack(total).mean(0), rtol=1e-4)


class Same(Reducer):
    """Each token stays what and where it is."""

    def reduce(self, references: References, counts: tuple[int, ...]) -> list[Reduced]:
        cells = [torch.cartesian_prod(*(torch.arange(float(n)) for n in r.grid)) for r in references.layout.references]
        parts = references.tokens.split(references.sizes, 1)
        return [Reduced(tokens, places) for tokens, places in zip(parts, cells, strict=True)]


@torch.no_grad()
def test_tokens_placed_at_their_own_cells_are_the_references_bit_for_bit() -> None:
    pipe = OMNI.build()
    (call,) = calls_of(pipe, **two())
    with sra.patched(pipe, sra.SparseRef(Same(), 0.5)):
        (same,) = calls_of(pipe, **two())
    assert torch.equal(same.sample, call.sample)


@torch.no_grad()
def test_pictures_are_encoded_as_the_pipeline_does() -> None:
    pipe, heard = OMNI.build(), []
    encode = pipe.vae.encode
    pipe.vae.encode = lambda x: (heard.append(x), encode(x))[1]
    (call,) = calls_of(pipe)
    adapter = adapter_for(pipe.transformer)
    given = adapter.bind(pipe.transformer, (), call.given)
    tokens, grid = adapter.encode(pipe, heard[0].float())
    assert grid == (8, 10)
    assert torch.equal(tokens, given["x"][:, :80])


@torch.no_grad()
def test_pictures_may_be_clean_or_noisy_each_for_itself() -> None:
    pipe = OMNI.build()
    given = calls_of(pipe)[0].given | {"image_noise_mask": [[0, 1, 1]]}
    with sra.patched(pipe.transformer, sra.SparseRef(sra.FromFunction(noise), KEEP)) as handle:
        handle.begin(steps=1)
        got = sample_of(pipe.transformer(**given))
        sizes = handle.record.layout.sizes
    assert torch.equal(got, by_hand(given, best(scores(sizes), sizes, KEEP)))


@torch.no_grad()
def test_a_model_without_features_is_served() -> None:
    pipe = OMNI.build()
    given = calls_of(pipe)[0].given | {"siglip_feats": [None]}
    with sra.patched(pipe.transformer, sra.SparseRef("mass", KEEP, sra.Cache(refresh=sra.Never()))) as handle:
        handle.begin(steps=2)
        outputs = []
        for step in range(2):
            handle.step(step)
            outputs.append(sample_of(pipe.transformer(**given)))
        assert handle.record.layout.text == zimage.words(given, 0) + 16 + 15
    assert torch.equal(outputs[0], sample_of(pipe.transformer(**given)))
    assert error(outputs[1], outputs[0]) > 10 * ROUNDING


def test_guidance_that_ends_within_a_run() -> None:
    """The calls after it have the conditional items alone, whose references are stored anew."""
    pipe = OMNI.build()
    given = {"guidance_scale": 3.0, "cfg_truncation": 0.5, "steps": 4}
    dense = OMNI.call(pipe, **given)
    with sra.patched(pipe, sra.SparseRef("mass", 1.0)):
        assert (OMNI.call(pipe, **given) == dense).all()
    with sra.patched(pipe, sra.SparseRef("edges", KEEP, sra.Cache(refresh=sra.Never()))) as handle:
        sizes = [len(call.given["x"]) for call in calls_of(pipe, **given)]
        assert (sizes[0], sizes[-1]) == (2, 1)
        assert [step.kept for step in handle.record.steps] == [161, 24 + 24, 24 + 24, 161]
        assert [step.kind for step in handle.record.steps] == ["dense", "cached", "cached", "dense"]


@torch.no_grad()
def test_calls_that_are_no_edit_run_as_they_are() -> None:
    """Without references, of one picture an item, and of items with other pictures."""
    pipe = OMNI.build()
    none = {"image": None, "height": 64, "width": 64}
    dense = OMNI.call(pipe, **none)
    given = calls_of(pipe)[0].given
    one = {
        "x": [given["x"][0][-1]], "cap_feats": [given["cap_feats"][0][0]], "t": given["t"], "return_dict": False
    }  # fmt: skip
    others = {name: given[name] * 2 for name in ("cap_feats", "siglip_feats", "image_noise_mask")}
    others |= {"x": [given["x"][0], [given["x"][0][1], *given["x"][0][1:]]], "t": given["t"].repeat(2)}
    want = [sample_of(pipe.transformer(**one)), sample_of(pipe.transformer(**others, return_dict=False))]
    with sra.patched(pipe, sra.SparseRef("mass", KEEP)):
        assert (OMNI.call(pipe, **none) == dense).all()
    with sra.patched(pipe.transformer, sra.SparseRef("mass", KEEP)):
        assert torch.equal(sample_of(pipe.transformer(**one)), want[0])
        assert torch.equal(sample_of(pipe.transformer(**others, return_dict=False)), want[1])


@torch.no_grad()
def test_a_copy_of_a_patched_model_is_as_published_and_so_is_the_model_after() -> None:
    pipe = OMNI.build()
    (call,) = calls_of(pipe)
    handle = sra.patch(pipe.transformer, sra.SparseRef("grid", KEEP))
    twin = copy.deepcopy(pipe.transformer)
    assert torch.equal(sample_of(twin(**call.given)), call.sample)
    assert not torch.equal(sample_of(pipe.transformer(**call.given)), call.sample)
    handle.remove()
    assert torch.equal(sample_of(pipe.transformer(**call.given)), call.sample)
    assert not any(isinstance(value, InstanceMethod) for value in vars(pipe.transformer).values())


def test_gradients_of_dropped_tokens_are_zero_under_training() -> None:
    pipe = OMNI.build()
    (call,) = calls_of(pipe)
    x = [picture.detach().requires_grad_() for picture in call.given["x"][0]]
    pipe.transformer.train()
    drop = sra.patch_for_training(pipe.transformer, sra.RandomDrop((0.25, 0.25)))
    sample_of(pipe.transformer(**call.given | {"x": [x]})).square().sum().backward()
    drop.remove()
    tokens = [torch.nn.functional.unfold(each.grad[:, 0], 2, stride=2).abs().sum(0) for each in x[:-1]]
    assert [len(each) for each in tokens] == [80, 81]
    assert int((torch.cat(tokens) > 0).sum()) == drop.kept[0].kept


def test_what_cannot_be_served_is_refused() -> None:
    pipe = OMNI.build()
    (call,) = calls_of(pipe)
    with pytest.raises(IncompatibleError, match="to run calls together, the attention of ZImage"):
        sra.patch_for_training(pipe.transformer, sra.RandomDrop((0.25, 0.5), per_sample=True))
    with pytest.raises(IncompatibleError, match=r"\(alone\), and that of Z-Image-Omni does not"):
        sra.patch(pipe, sra.SparseRef("edges", 1.0, sra.Cache(isolated=True)))
    with (
        sra.patched(pipe.transformer, sra.SparseRef("grid", KEEP)),
        pytest.raises(IncompatibleError, match="got controlnet_block_samples beside them"),
    ):
        pipe.transformer(**call.given | {"controlnet_block_samples": {0: torch.zeros(1, 480, 32)}})


def test_references_of_any_number_and_the_size_of_the_last() -> None:
    pipe = OMNI.build()
    pictures = [picture(64, 64, 0), picture(64, 96, 1), picture(96, 64, 2)]
    with sra.patched(pipe, sra.SparseRef("edges", KEEP)) as handle:
        made = OMNI.call(pipe, image=pictures, height=None, width=None, steps=1, output_type="np")
        assert made.shape == (64, 96, 3)
        assert [r.grid for r in handle.record.layout.references] == [(8, 8), (12, 8), (8, 12)]
