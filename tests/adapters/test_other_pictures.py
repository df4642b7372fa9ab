"""A reference never gets the pixels of another picture, whatever the VAE encoded before, beside it or meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.errors import PixelsUnavailableError
from sparse_ref_attn.patching.pixels import PixelTap
from sparse_ref_attn.types import Reference, TokenLayout
from tests.latents import CASES
from tests.pictures import generator, picture
from tests.pipelines import Case

A, B = picture(48, 32, 11), picture(48, 32, 22)
EDGES = sra.SparseRef("edges", 0.25)


def latents_of(pipe: Any, image: Any) -> Tensor:
    """What the pipeline makes of an image; encoded before the patch, or by a pipeline of its own."""
    with torch.no_grad():
        return pipe._encode_vae_image(pipe.image_processor.preprocess(image, height=32, width=48), None)


def image_to_image(pipe: Any) -> None:
    other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    other(prompt="a", image=A, height=32, width=48, strength=0.5, num_inference_steps=2, max_sequence_length=32)


def a_request_that_died(pipe: Any) -> None:
    def gone(*args: Any, **kwargs: Any) -> None:
        type(pipe).prepare_latents(pipe, *args, **kwargs)
        raise ConnectionError

    pipe.prepare_latents = gone
    with pytest.raises(ConnectionError):
        CASES["kontext"].call(pipe, image=A)
    del pipe.prepare_latents


def a_plain_encode(pipe: Any) -> None:
    latents_of(pipe, A)


def the_very_picture(pipe: Any) -> None:
    latents_of(pipe, B)


def in_a_thread(pipe: Any) -> None:
    thread = threading.Thread(target=latents_of, args=(pipe, A))
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "before", [image_to_image, a_request_that_died, a_plain_encode, the_very_picture, in_a_thread, lambda pipe: None]
)
def test_a_reference_given_as_latents_has_no_pixels(before: Any) -> None:
    case = CASES["kontext"]
    pipe = case.build()
    known = latents_of(pipe, B)
    with sra.patched(pipe, EDGES) as handle:
        before(pipe)
        with pytest.raises(PixelsUnavailableError, match=r"no image that this call encoded is surely the one"):
            case.call(pipe, image=known)
        case.call(pipe, image=B)  # and the next run sees its own
        (own,) = handle.record.pixels
    assert torch.allclose(own, pipe.image_processor.preprocess(B, height=32, width=48), atol=1e-6)


@pytest.mark.parametrize("name", ["qwen_edit", "klein"])
def test_what_was_encoded_before_the_call_is_not_offered_to_it(name: str) -> None:
    """The first run's own picture is not the second's, which is given the tokens ready made."""
    case = CASES[name]
    pipe = case.build()
    given: list[Tensor] = []
    prepare = pipe.prepare_latents if name == "qwen_edit" else pipe.prepare_image_latents

    def replay(*args: Any, **kwargs: Any) -> Any:
        out = given[0] if given else prepare(*args, **kwargs)
        given.append(out)
        return out

    setattr(pipe, prepare.__name__, replay)
    with sra.patched(pipe, sra.SparseRef("grid", 0.5)) as handle:
        case.call(pipe, first=1)
        assert handle.record.pixels[0] is not None
        pipe.vae.encode(handle.record.pixels[0] if name == "klein" else handle.record.pixels[0][:, :, None])
        case.call(pipe, first=1)
        assert handle.record.pixels == [None]


def test_another_picture_of_the_same_call_is_not_the_references() -> None:
    """Inpainting encodes its picture, of the size of the references, here given as latents."""
    case = CASES["klein_inpaint"]
    pipe = case.build()
    request: dict[str, Any] = {"references": 2, "sizes": [(64, 64)], "image": picture(64, 64, 5)}
    with sra.patched(pipe, EDGES) as handle:
        with pytest.raises(PixelsUnavailableError, match="reference 1 has none"):
            case.call(pipe, latents=True, **request)
        case.call(pipe, image_reference=picture(64, 64, 7), **request)
        for own, seed in zip(handle.record.pixels, (5, 7), strict=True):
            assert torch.equal(own, preprocessed(pipe, seed))
    with sra.patched(pipe, sra.SparseRef("grid", 0.5)) as handle:
        case.call(pipe, latents=True, **request)
        first, second = handle.record.pixels
        assert second is None
        assert torch.equal(first, preprocessed(pipe, 5))


def preprocessed(pipe: Any, seed: int) -> Tensor:
    return pipe.image_processor.preprocess(picture(64, 64, seed), height=64, width=64)


def test_items_of_a_batch_do_not_hear_each_other() -> None:
    pipe = CASES["kontext"].build()
    known = latents_of(pipe, B)
    with pytest.raises(sra.BatchError, match=r"item 1 of the batch failed: PixelsUnavailableError"):
        sra.batch(
            pipe, ["a", "b"], [[A], [known]], config=EDGES, generators=[generator(i) for i in range(2)],
            num_inference_steps=2, height=32, width=32, max_area=32 * 32, _auto_resize=False, max_sequence_length=32,
        )  # fmt: skip


def test_a_loop_of_ones_own_hears_what_it_encoded_itself() -> None:
    """No pipeline call, before or after: pictures are still told apart by what their tokens are."""
    tap, vae = tap_on(lambda x: x)
    first, second = (torch.randn(1, 3, 8, 8, generator=generator(i)) for i in range(2))
    for x in (first, second):
        vae.encode(x)
    (got,) = tap.take(layout(8, 8), tokens_of(first))
    assert torch.equal(got, first)
    assert tap.take(layout(8, 8), tokens_of(first)) == [None]  # forgotten


class Vae(torch.nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def encode(self, x: Tensor) -> Any:
        return type("Encoded", (), {"latents": self.change(x)})()


def tap_on(change: Any) -> tuple[PixelTap, Vae]:
    vae = Vae(change)
    return PixelTap(vae), vae


def layout(height: int, width: int, count: int = 1) -> TokenLayout:
    size = height * width
    references = tuple(Reference(4 + i * size, size, (height, width)) for i in range(count))
    return TokenLayout(4 + count * size, 3, (0, 4), references)


def tokens_of(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, R, 3): a VAE that changes nothing, each channel scaled and shifted by a model in `dtype`."""
    scale, shift = torch.tensor([[2.0, -0.5, 7.0], [1.0, 3.0, -4.0]])
    return (pixels.flatten(2).transpose(1, 2).to(dtype) - shift.to(dtype)) * scale.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_its_own_is_recognised_in_every_precision_and_a_retouched_one_is_not(dtype: torch.dtype) -> None:
    photo = torch.from_numpy(np.asarray(picture(32, 32, 3)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    retouched = photo.clone()
    retouched[..., 4:12, 4:12] = retouched[..., 4:12, 4:12].flip(-1)
    tap, vae = tap_on(lambda x: x.to(dtype))
    for heard, own in ((photo, True), (retouched, False)):
        vae.encode(heard)
        (got,) = tap.take(layout(32, 32), tokens_of(photo, dtype))
        assert (got is not None) is own
    for heard in (retouched, photo, retouched):
        vae.encode(heard)
    (got,) = tap.take(layout(32, 32), tokens_of(photo, dtype))
    assert torch.equal(got, photo)


def test_each_item_of_a_batch_has_its_own_or_none_has() -> None:
    tap, vae = tap_on(lambda x: x)
    pair = torch.randn(2, 3, 4, 4, generator=generator(0))
    for given, want in (
        ([pair], pair),
        ([pair[:1], pair[1:]], pair),
        ([pair[1:], pair[:1]], pair),
        ([pair[:1]], None),  # the other item's is not known
    ):
        for x in given:
            vae.encode(x)
        (got,) = tap.take(layout(4, 4), tokens_of(pair))
        assert (got is None) if want is None else torch.equal(got, want)
    vae.encode(pair)
    (got,) = tap.take(layout(4, 4), tokens_of(torch.cat([pair, pair])))  # two pictures of each
    assert torch.equal(got, pair)
    vae.encode(pair)
    one, two = tap.take(layout(4, 4, 2), torch.cat([tokens_of(pair[1:]), tokens_of(pair[:1])], 1))
    assert torch.equal(one, pair[1:])
    assert torch.equal(two, pair[:1])


def test_a_picture_without_structure() -> None:
    """One that is the same everywhere is recognised as such; of a single token nothing is sure."""
    tap, vae = tap_on(lambda x: x)
    flat, rough = torch.full((1, 3, 4, 4), 0.3), torch.randn(1, 3, 4, 4, generator=generator(0))
    vae.encode(flat)
    vae.encode(rough)
    (got,) = tap.take(layout(4, 4), tokens_of(flat))
    assert torch.equal(got, flat)
    vae.encode(flat)
    assert tap.take(layout(4, 4), tokens_of(rough)) == [None]
    vae.encode(rough[..., :1, :1])
    assert tap.take(layout(1, 1), tokens_of(rough[..., 1:2, 1:2])) == [None]


def test_an_encoding_that_is_not_known_gives_no_pixels() -> None:
    vae = Vae(lambda x: x)
    vae.encode = lambda x: object()
    tap = PixelTap(vae)
    x = torch.randn(1, 3, 4, 4)
    vae.encode(x)
    assert tap.take(layout(4, 4), tokens_of(x)) == [None]


def test_threads_keep_their_pictures() -> None:
    """One thread's run does not forget what another's has encoded and not yet used."""
    case: Case = CASES["kontext"]
    pipes = [case.build()]
    pipes.append(type(pipes[0])(**pipes[0].components))
    heard, go = threading.Event(), threading.Event()
    with sra.patched(pipes[0], sra.SparseRef("grid", 0.5)) as handle:
        tap = handle._generations.pixels
        seen: dict[str, Any] = {}

        def other() -> None:
            class Call:
                vae = pipes[0].vae

                def __call__(self) -> None:
                    latents = latents_of(pipes[1], B)
                    heard.set()
                    go.wait(60)
                    tokens = pipes[1]._pack_latents(latents, *latents.shape)
                    seen["other"] = tap.take(layout(8, 12), tokens)

            Call()()

        thread = threading.Thread(target=other)
        thread.start()
        assert heard.wait(60)
        case.call(pipes[0], image=A)
        own = handle.record.pixels[0]
        go.set()
        thread.join()
    assert torch.allclose(own, pipes[0].image_processor.preprocess(A, height=32, width=48), atol=1e-6)
    want = pipes[0].image_processor.preprocess(B, height=32, width=48)
    assert torch.allclose(seen["other"][0], want, atol=1e-6)
