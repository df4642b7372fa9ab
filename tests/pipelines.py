"""Tiny real diffusers pipelines with seeded random weights, one call for each, and a record of what the model is given.

Nothing is downloaded and nothing is mocked: the classes are diffusers' own, only their sizes are small. Weights are drawn
so that the picture depends visibly on the prompt and on every reference (at the default initialisation it hardly does).
References default to another shape than the output, so that mixing up rows and columns, or the two grids, is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from tests import text_encoders

PROMPTS = ("a cat", "two dogs beside a red kite", "rain", "a very long road")
NEGATIVE = "blurry, dark, wrong"
LATENT_CHANNELS = 4
REFERENCE_AREA = 80**2  # Qwen references are resized to this; 64 x 64, 96 x 64 and 64 x 96 stay what they are


# ---------------------------------------------------------------- pictures
def picture(width: int = 64, height: int = 64, seed: int = 0) -> PIL.Image.Image:
    """A smooth gradient with a disc and a bar, their places and colours drawn from `seed`."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:1 : height * 1j, 0:1 : width * 1j]
    slope = random.uniform(-1, 1, (2, 3))
    ramp = 0.5 + 0.5 * np.sin(3 * (x[..., None] * slope[0] + y[..., None] * slope[1]) + random.uniform(0, 6, 3))
    image = PIL.Image.fromarray((255 * ramp).astype(np.uint8))
    draw = PIL.ImageDraw.Draw(image)
    colours = [tuple(int(c) for c in random.integers(0, 256, 3)) for _ in range(2)]
    left, top = random.uniform(0, 0.6, 2) * (width, height)
    draw.ellipse([left, top, left + 0.35 * width, top + 0.35 * height], fill=colours[0])
    left, top = random.uniform(0, 0.7, 2) * (width, height)
    draw.rectangle([left, top, left + 0.15 * width, top + 0.5 * height], fill=colours[1])
    return image


def mask(width: int, height: int) -> PIL.Image.Image:
    """White where inpainting repaints: a centred box of half the side."""
    image = PIL.Image.new("L", (width, height), 0)
    box = [width // 4, height // 4, 3 * width // 4 - 1, 3 * height // 4 - 1]
    PIL.ImageDraw.Draw(image).rectangle(box, fill=255)
    return image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


# ---------------------------------------------------------------- building
def _scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True)


def _rope_axes(head_dim: int, axes: int) -> tuple[int, ...]:
    """`head_dim` split into even parts, the first (which image) the smallest of three, or four alike."""
    if head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}")
    return (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8) if axes == 3 else (head_dim // 4,) * 4


def _enliven(transformer: torch.nn.Module, seed: int) -> None:
    """Redraw the linear layers at unit gain, and sharpen attention through the gains of the query and key norms."""
    random = generator(seed + 1)
    with torch.no_grad():
        for name, module in transformer.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5, generator=random)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=random)
            elif name.rsplit(".", 1)[-1] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                module.weight.mul_(1.5)


def _ready(pipe: Any, seed: int) -> Any:
    _enliven(pipe.transformer, seed)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe


def _build_kontext(pipeline: type) -> Callable[..., Any]:
    def build(seed: int = 0, layers: int = 2, single: int = 2, heads: int = 2, head_dim: int = 16) -> Any:
        torch.manual_seed(seed)
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=layers, num_single_layers=single,
            attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=32,
            pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=_rope_axes(head_dim, 3),
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            sample_size=32, block_out_channels=(8, 8), layers_per_block=1, latent_channels=LATENT_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609,
            scaling_factor=1.5035,
        )  # fmt: skip
        (tokenizer, clip), (tokenizer_2, t5) = text_encoders.clip(), text_encoders.t5()
        pipe = pipeline(
            scheduler=_scheduler(), vae=vae, text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5,
            tokenizer_2=tokenizer_2, transformer=transformer,
        )  # fmt: skip
        return _ready(pipe, seed)

    return build


def _build_flux2(pipeline: type, text_encoder: Callable[[], tuple], guidance: bool = False) -> Callable[..., Any]:
    def build(seed: int = 0, layers: int = 2, single: int = 2, heads: int = 2, head_dim: int = 16) -> Any:
        torch.manual_seed(seed)
        transformer = diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=layers, num_single_layers=single,
            attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=48,
            timestep_guidance_channels=32, axes_dims_rope=_rope_axes(head_dim, 4), guidance_embeds=guidance,
        )  # fmt: skip
        vae = diffusers.AutoencoderKLFlux2(
            sample_size=32, block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=LATENT_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
        )  # fmt: skip
        tokenizer, encoder = text_encoder()
        pipe = pipeline(
            scheduler=_scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer
        )
        pipe.system_message = "edit"  # FLUX.2 dev's own is longer than the tests' 32 tokens
        return _ready(pipe, seed)

    return build


def _build_qwen(pipeline: type, zero_cond_t: bool = False) -> Callable[..., Any]:
    def build(seed: int = 0, layers: int = 2, single: int = 0, heads: int = 2, head_dim: int = 16) -> Any:
        """`single` is accepted for the common signature; Qwen has no single-stream blocks."""
        torch.manual_seed(seed)
        transformer = diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=layers,
            attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=16,
            axes_dims_rope=_rope_axes(head_dim, 3), zero_cond_t=zero_cond_t,
        )  # fmt: skip
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True], latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        )  # fmt: skip
        tokenizer, processor, encoder = text_encoders.qwen_vl()
        pipe = pipeline(
            scheduler=_scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, processor=processor,
            transformer=transformer,
        )  # fmt: skip
        # The pipeline drops the template's head by its length under the published tokenizer; ours has a token a byte.
        head, role, _ = pipe.prompt_template_encode.partition("<|im_start|>user\n")
        tokens = tokenizer(head + role).input_ids
        pipe.prompt_template_encode_start_idx = len(tokens)
        return _ready(pipe, seed)

    return build


# ---------------------------------------------------------------- calling
def _pictures(sizes: Sequence[tuple[int, int]], first: int = 0) -> list[PIL.Image.Image]:
    return [picture(width, height, seed) for seed, (width, height) in enumerate(sizes, start=first)]


def _call_kontext(
    pipe: Any, *, references: int = 1, batch: int = 1, steps: int = 3, side: int = 32, cfg: bool = False,
    images_per_prompt: int = 1, sizes: Sequence[tuple[int, int]] | None = None, seed: int = 0,
    latents: bool = False, first: int = 0, callback: Callable | None = None, **kw: Any,
) -> np.ndarray:  # fmt: skip
    """FLUX.1 Kontext. A list of images is a batch of references, one a sample, all of one size."""
    (width, height) = (sizes or [(48, 32)])[0]
    images: Any = _pictures([(width, height)] * batch, first)
    if latents:
        images = torch.randn(batch, LATENT_CHANNELS, height // 2, width // 2, generator=generator(first))
    elif batch == 1:
        images = images[0]
    if cfg:
        kw = {"negative_prompt": [NEGATIVE] * batch, "true_cfg_scale": 2.0, **kw}
    kw = {"max_area": side * side, "_auto_resize": False, "max_sequence_length": 32, "output_type": "np", **kw}
    return pipe(
        image=images if references else None, prompt=list(PROMPTS[:batch]), num_inference_steps=steps, height=side,
        width=side, num_images_per_prompt=images_per_prompt, generator=generator(seed),
        callback_on_step_end=callback, **kw,
    ).images  # fmt: skip


def _call_flux2(
    pipe: Any, *, references: int = 1, batch: int = 1, steps: int = 3, side: int = 64, cfg: bool = False,
    images_per_prompt: int = 1, sizes: Sequence[tuple[int, int]] | None = None, seed: int = 0,
    latents: bool = False, first: int = 0, callback: Callable | None = None, **kw: Any,
) -> np.ndarray:  # fmt: skip
    """FLUX.2 dev, Klein, Klein-KV. A list of images is several references, shared by the whole batch."""
    images = _pictures((sizes or [(96, 64), (64, 64), (64, 96)])[:references], first)
    if not isinstance(pipe, diffusers.Flux2KleinKVPipeline):
        kw = {"guidance_scale": 3.0 if cfg or isinstance(pipe, diffusers.Flux2Pipeline) else 1.0, **kw}
    kw = {"max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3), "output_type": "np", **kw}
    return pipe(
        image=images or None, prompt=list(PROMPTS[:batch]), num_inference_steps=steps, height=side, width=side,
        num_images_per_prompt=images_per_prompt, generator=generator(seed), callback_on_step_end=callback, **kw,
    ).images  # fmt: skip


@contextmanager
def _small_references() -> Iterator[None]:
    """Qwen resizes every reference to a million pixels; while a test's call runs, to `REFERENCE_AREA` at most."""
    published = {
        module: module.calculate_dimensions for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus)
    }
    for module, dimensions in published.items():
        module.calculate_dimensions = lambda area, ratio, f=dimensions: f(min(area, REFERENCE_AREA), ratio)
    try:
        yield
    finally:
        for module, dimensions in published.items():
            module.calculate_dimensions = dimensions


def _encode_qwen(pipe: Any, prompts: Sequence[str], images: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts encoded one by one (the pipelines cannot batch them), then padded to the longest, with their mask."""
    condition = [image.resize((64, 64)) for image in images]
    rows = [pipe.encode_prompt(prompt=prompt, image=condition, device="cpu")[0][0] for prompt in prompts]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()


def _call_qwen(
    pipe: Any, *, references: int = 1, batch: int = 1, steps: int = 3, side: int = 64, cfg: bool = False,
    images_per_prompt: int = 1, sizes: Sequence[tuple[int, int]] | None = None, seed: int = 0,
    latents: bool = False, first: int = 0, callback: Callable | None = None, **kw: Any,
) -> np.ndarray:  # fmt: skip
    """Qwen-Image-Edit and -Plus. Under `cfg` or `batch` > 1 the prompts' masks have padding in them."""
    images = _pictures((sizes or [(96, 64), (64, 64), (64, 96)])[:references], first)
    if cfg or batch > 1:
        prompts = [*PROMPTS[:batch], *([NEGATIVE] * batch if cfg else [])]
        with torch.no_grad():
            embeds, keep = _encode_qwen(pipe, prompts, images)
        kw = {"prompt_embeds": embeds[:batch], "prompt_embeds_mask": keep[:batch], **kw}
        if cfg:
            kw = {"negative_prompt_embeds": embeds[batch:], "negative_prompt_embeds_mask": keep[batch:], **kw}
    else:
        kw = {"prompt": PROMPTS[0], **kw}
    kw = {"true_cfg_scale": 2.0 if cfg else 1.0, "output_type": "np", **kw}
    with _small_references():
        return pipe(
            image=images if len(images) > 1 else images[0], num_inference_steps=steps, height=side, width=side,
            num_images_per_prompt=images_per_prompt, generator=generator(seed), callback_on_step_end=callback, **kw,
        ).images  # fmt: skip


# ---------------------------------------------------------------- the cases
@dataclass(frozen=True)
class Case:
    """One pipeline, how to build it and how to call it.

    Attributes
    ----------
    name : str
        Key in `CASES`.
    build : callable
        ``build(seed=0, layers=2, single=2, heads=2, head_dim=16) -> pipe``.
    call : callable
        ``call(pipe, *, references=1, batch=1, steps=3, side=..., cfg=False, images_per_prompt=1, sizes=None, seed=0,
        latents=False, first=0, callback=None, **pipeline_arguments) -> np.ndarray`` of shape (images, side, side, 3) in
        [0, 1]. `sizes` are (width, height) in pixels, one a reference; `first` is the seed of the first reference's
        picture (another `first`, other references); `references` = 0 is a call without an image.
    references : tuple of int
        Numbers of references in the sequence that the pipeline allows.
    cfg : bool
        Whether ``cfg=True`` makes two transformer calls a step.
    batch : tuple of int
        Numbers of prompts that the pipeline allows.
    latents : bool
        Whether ``latents=True`` hands over the reference as latents, which the VAE then does not encode.
    text_to_image : bool
        Whether ``references=0`` is allowed.
    """

    name: str
    build: Callable[..., Any]
    call: Callable[..., np.ndarray]
    references: tuple[int, ...]
    cfg: bool
    batch: tuple[int, ...]
    latents: bool
    text_to_image: bool


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("kontext", _build_kontext(diffusers.FluxKontextPipeline), _call_kontext, (1,), True, (1, 2), True, True),
        Case("klein", _build_flux2(diffusers.Flux2KleinPipeline, text_encoders.qwen3), _call_flux2,
             (1, 2, 3), True, (1, 2), False, True),
        Case("qwen_edit_plus", _build_qwen(diffusers.QwenImageEditPlusPipeline), _call_qwen,
             (1, 2, 3), True, (1,), False, False),
        Case("qwen_edit_plus_2511", _build_qwen(diffusers.QwenImageEditPlusPipeline, zero_cond_t=True), _call_qwen,
             (1, 2, 3), True, (1,), False, False),
    )
}  # fmt: skip


def record_calls(transformer: torch.nn.Module) -> tuple[list[dict[str, Any]], Callable[[], None]]:
    """Note what each call of `transformer` is given.

    Returns
    -------
    calls : list of dict
        One a call, growing: the shape of every tensor argument by name, every other argument as it is.
    remove : callable
        Stops the recording.
    """
    calls: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append({k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})

    return calls, transformer.register_forward_pre_hook(note, with_kwargs=True).remove
