"""Selectors see the very pixels that the pipeline encoded, each reference its own, whatever else it encodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.selection import References
from tests.latents import CASES, each_case
from tests.pictures import generator, mask, picture
from tests.pipelines import Case


def spy(vae: torch.nn.Module) -> list[Tensor]:
    """What `vae.encode` is given. To be called before patching: the library's own wrapper calls this one."""
    seen: list[Tensor] = []
    encode = vae.encode

    def noted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(x)
        return encode(x, *args, **kwargs)

    vae.encode = noted
    return seen


def seen_by_selector(case: Case, pipe: Any, **request: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What the selector saw, and what the VAE encoded."""
    encoded, shown = spy(pipe.vae), []

    def look(references: References) -> list[Tensor]:
        shown.extend(references.image(i) for i in range(len(references.sizes)))
        return [torch.arange(size).float() for size in references.sizes]

    with sra.patched(pipe, sra.SparseRef(sra.FromFunction(look), 0.5)):
        case.call(pipe, steps=1, **request)
    return shown, encoded


def pixels(image: Any) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1


@each_case()
def test_the_tensor_that_was_encoded(case: Case) -> None:
    """Bit for bit, not resized, each reference another."""
    pipe = case.build()
    shown, encoded = seen_by_selector(case, pipe, references=max(case.references))
    assert len(shown) == max(case.references)
    given = [item[:, 0] if item.ndim == 4 else item for x in encoded for item in x]  # Qwen's have a frame axis
    for image in shown:
        assert image.shape[:2] == (1, 3)
        assert any(torch.equal(image[0], item) for item in given)
        assert float(image.min()) >= -1
        assert float(image.max()) <= 1
        assert float(image.std()) > 0.1
    for i, image in enumerate(shown):
        assert all(not torch.equal(image, other) for other in shown[i + 1 :])


@pytest.mark.parametrize("name", ["flux2", "klein", "klein_kv"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_references_of_one_size_keep_their_order(name: str, order: tuple[int, ...]) -> None:
    images = [picture(64, 64, seed) for seed in order]
    shown, _ = seen_by_selector(CASES[name], CASES[name].build(), references=3, image=images)
    for image, wanted in zip(shown, images, strict=True):
        assert torch.allclose(image, pixels(wanted), atol=1e-6)


@pytest.mark.parametrize("references", [2, 3])
def test_klein_inpainting_tells_its_pictures_apart(references: int) -> None:
    """The inpainted picture and its references, all of the output's size, two of them encoded in one call."""
    case = CASES["klein_inpaint"]
    images = [picture(64, 64, seed) for seed in (5, 6, 7)[:references]]
    others: Any = images[1] if references == 2 else images[1:]
    shown, _ = seen_by_selector(
        case, case.build(), references=references, sizes=[(64, 64)], image=images[0], image_reference=others
    )
    for image, wanted in zip(shown, images, strict=True):
        assert torch.allclose(image, pixels(wanted), atol=1e-6)


@pytest.mark.parametrize("seeds", [(1, 2), (2, 1), (8, 3)], ids=str)
def test_kontext_inpainting_encodes_more_than_its_reference(seeds: tuple[int, int]) -> None:
    """Inpainted picture, reference and masked picture, all of one size: the reference is the one that gives tokens."""
    case = CASES["kontext_inpaint_reference"]
    image, reference = (picture(32, 32, seed) for seed in seeds)
    shown, encoded = seen_by_selector(
        case, case.build(), image=image, image_reference=reference, mask_image=mask(32, 32), sizes=[(32, 32)]
    )
    assert len(encoded) == 3
    assert len(shown) == 1
    assert torch.allclose(shown[0], pixels(reference), atol=1e-6)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_kontext_inpainting_without_another_reference(strength: float) -> None:
    """The inpainted picture is the reference, not its masked form that is encoded after it."""
    case = CASES["kontext_inpaint"]
    shown, encoded = seen_by_selector(case, case.build(), image=picture(32, 32, 4), strength=strength)
    assert len(encoded) == 2
    assert torch.allclose(shown[0], pixels(picture(32, 32, 4)), atol=1e-6)


@pytest.mark.parametrize("name", ["kontext", "qwen_edit"])
def test_one_reference_a_sample(name: str) -> None:
    """A batch of references is seen as a batch, also where a list of generators makes the VAE encode one by one."""
    case = CASES[name]
    together, _ = seen_by_selector(case, case.build(), batch=2)
    assert together[0].shape[0] == 2
    assert not torch.equal(together[0][0], together[0][1])
    apart, encoded = seen_by_selector(case, case.build(), batch=2, generator=[generator(0), generator(1)])
    assert [len(x) for x in encoded] == [1, 1]
    assert torch.equal(apart[0], together[0])


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
def test_pictures_of_an_earlier_run_are_gone(name: str) -> None:
    """A second run sees its own, also after a run that failed before the transformer."""
    case = CASES[name]
    pipe = case.build()
    encoded = spy(pipe.vae)
    handle = sra.patch(pipe, sra.SparseRef("edges", 0.5))
    case.call(pipe, steps=1)
    pipe.vae.encode(encoded[0].flip(-1))  # somebody else's use of the VAE between two runs
    for first in (3, 4):
        before = len(encoded)
        case.call(pipe, steps=1, first=first)
        (own,) = handle.record.pixels
        assert own is not None
        wanted = encoded[before]
        assert torch.equal(own, wanted[:, :, 0] if wanted.ndim == 5 else wanted)
