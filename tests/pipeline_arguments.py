"""What each supported pipeline is called with: one function each, from (pipe, `Request`) to its own arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch

from tests.pictures import generator, mask, picture
from tests.tiny_models import LATENT_CHANNELS

PROMPTS = ("a cat", "two dogs beside a red kite", "rain", "a very long road")
NEGATIVE = "blurry, dark, wrong"
PADDING = 2  # masked text rows after the longest Qwen prompt of a batch
INPAINTED = 100  # seed of the picture that is inpainted where it is not itself a reference


@dataclass(frozen=True)
class Request:
    """What `Case.call` was asked for; the fields are described there."""

    references: int
    batch: int
    side: int
    cfg: bool
    sizes: tuple[tuple[int, int], ...]
    latents: bool
    first: int

    def pictures(self, count: int, start: int = 0) -> list[PIL.Image.Image]:
        """References `start` to `start` + `count`, each of its own size and seed."""
        return [picture(*self.sizes[i], self.first + i) for i in range(start, start + count)]

    def one_a_sample(self) -> list[PIL.Image.Image]:
        """The first reference, as another picture of the same size for each item of the batch."""
        return [picture(*self.sizes[0], self.first + i) for i in range(self.batch)]


def _noise_latents(count: int, channels: int, size: tuple[int, int], pixels: int, seed: int) -> torch.Tensor:
    return torch.randn(count, channels, size[1] // pixels, size[0] // pixels, generator=generator(seed))


def _one_or_list(images: list[PIL.Image.Image]) -> Any:
    return images[0] if len(images) == 1 else images


def _flux(request: Request) -> dict[str, Any]:
    arguments: dict[str, Any] = {"max_area": request.side**2, "_auto_resize": False, "max_sequence_length": 32}
    if request.cfg:
        arguments |= {"negative_prompt": [NEGATIVE] * request.batch, "true_cfg_scale": 2.0}
    return arguments


def kontext(pipe: Any, request: Request) -> dict[str, Any]:
    """A list of images is a batch of references, one a sample, all of one size."""
    image: Any = _one_or_list(request.one_a_sample()) if request.references else None
    if request.latents:
        image = _noise_latents(request.batch, LATENT_CHANNELS, request.sizes[0], 2, request.first)
    return _flux(request) | {"image": image}


def kontext_inpaint(pipe: Any, request: Request) -> dict[str, Any]:
    """The inpainted picture, of the output's size, is the reference."""
    images = [picture(request.side, request.side, request.first + i) for i in range(request.batch)]
    return _flux(request) | {"image": _one_or_list(images), "mask_image": mask(request.side, request.side)}


def kontext_inpaint_reference(pipe: Any, request: Request) -> dict[str, Any]:
    """The inpainted picture gives no tokens; `image_reference` is the reference."""
    return _flux(request) | {
        "image": picture(request.side, request.side, INPAINTED),
        "mask_image": mask(request.side, request.side),
        "image_reference": _one_or_list(request.one_a_sample()),
    }


def _flux2_text(request: Request) -> dict[str, Any]:
    return {"max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)}


def flux2(pipe: Any, request: Request) -> dict[str, Any]:
    """A list of images is several references, shared by the whole batch."""
    return _flux2_text(request) | {"image": request.pictures(request.references) or None}


def klein(pipe: Any, request: Request) -> dict[str, Any]:
    return flux2(pipe, request) | {"guidance_scale": 3.0 if request.cfg else 1.0}


def klein_inpaint(pipe: Any, request: Request) -> dict[str, Any]:
    """The inpainted picture is the first reference, `image_reference` the others, all of one size."""
    output = (request.side, request.side)
    arguments: dict[str, Any] = {
        "image": picture(*output, request.first),
        "mask_image": mask(*output),
        "guidance_scale": 3.0 if request.cfg else 1.0,
        "strength": 1.0,
    }
    others = [picture(*request.sizes[0], request.first + i) for i in range(1, request.references)]
    if others:
        arguments["image_reference"] = _one_or_list(others)
    if request.latents:
        arguments["image"] = _noise_latents(1, 4 * LATENT_CHANNELS, output, 8, request.first)
        if others:
            arguments["image_reference"] = _noise_latents(
                len(others), 4 * LATENT_CHANNELS, request.sizes[0], 8, request.first + 1
            )
    return _flux2_text(request) | arguments


def longcat(pipe: Any, request: Request) -> dict[str, Any]:
    """The picture that is edited gives the output its size."""
    arguments: dict[str, Any] = {"image": picture(request.side, request.side, request.first), "guidance_scale": 1.0}
    return arguments | ({"negative_prompt": NEGATIVE, "guidance_scale": 2.0} if request.cfg else {})


def _encode_qwen(pipe: Any, prompts: Sequence[str], seen: Sequence[list]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts encoded one by one (the pipelines cannot batch them), padded past the longest, and their mask."""
    rows = [
        pipe.encode_prompt(prompt=prompt, image=[image.resize((64, 64)) for image in images], device=pipe.device)[0][0]
        for prompt, images in zip(prompts, seen, strict=True)
    ]
    padded = torch.nn.functional.pad(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), (0, 0, 0, PADDING))
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]).long()


def _qwen(pipe: Any, request: Request, images: list, seen: list[list]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"image": _one_or_list(images), "true_cfg_scale": 2.0 if request.cfg else 1.0}
    if request.batch == 1 and not request.cfg:
        return arguments
    with torch.no_grad():
        embeds, keep = _encode_qwen(pipe, PROMPTS[: request.batch], seen)
        arguments |= {"prompt": None, "prompt_embeds": embeds, "prompt_embeds_mask": keep}
        if request.cfg:
            embeds, keep = _encode_qwen(pipe, [NEGATIVE] * request.batch, seen)
            arguments |= {"negative_prompt_embeds": embeds, "negative_prompt_embeds_mask": keep}
    return arguments


def qwen_edit(pipe: Any, request: Request) -> dict[str, Any]:
    """A list of images is a batch of references, one a sample. Batches and guidance have padding in their masks."""
    images = request.one_a_sample()
    return _qwen(pipe, request, images, [[image] for image in images])


def qwen_edit_plus(pipe: Any, request: Request) -> dict[str, Any]:
    """A list of images is several references. Guidance has padding in its masks."""
    images = request.pictures(request.references)
    return _qwen(pipe, request, images, [images])


def qwen_inpaint(pipe: Any, request: Request) -> dict[str, Any]:
    """The inpainted picture, of the output's size, is the reference."""
    side = (request.side, request.side)
    images = [picture(*side, request.first + i) for i in range(request.batch)]
    return qwen_edit(pipe, request) | {"image": _one_or_list(images), "mask_image": mask(*side), "strength": 1.0}
