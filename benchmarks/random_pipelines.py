"""Real diffusers pipelines around a transformer of real width: random weights, prompts given as embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import diffusers
import PIL.Image
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

from sparse_ref_attn.models import named_model
from sparse_ref_attn.pictures import open_image

from .shapes import TEXT_TOKENS, PipelineCase

__all__ = ["build", "caller", "embeddings", "own_arguments", "photos", "transformer_of", "with_cache"]

# Eight times smaller in space as the published VAEs are, and so narrow that it hardly takes time.
_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "mid_block_add_attention": False,
}


def build(case: PipelineCase, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of `case`; weights are drawn from seed 0.

    Parameters
    ----------
    case : PipelineCase
    device : torch.device
    dtype : torch.dtype
        Of every component.
    """
    torch.manual_seed(0)
    transformer = transformer_of(case, device, dtype)
    parts: dict[str, Any] = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "transformer": transformer,
        "text_encoder": None,
        "tokenizer": None,
    }
    if case.model == "kontext":
        vae = diffusers.AutoencoderKL(latent_channels=16, shift_factor=0.1159, scaling_factor=0.3611, **_VAE)
        pipe = diffusers.FluxKontextPipeline(vae=vae, text_encoder_2=None, tokenizer_2=None, **parts)
    elif case.model.startswith("qwen"):
        vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        pipe = diffusers.QwenImageEditPlusPipeline(vae=vae, processor=None, **parts)
    else:
        vae = diffusers.AutoencoderKLFlux2(latent_channels=32, **_VAE)
        if case.model == "flux2-dev":
            pipe = diffusers.Flux2Pipeline(vae=vae, **parts)
        else:
            pipe = diffusers.Flux2KleinPipeline(vae=vae, is_distilled=True, **parts)
    vae.to(device, dtype).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer_of(case: PipelineCase, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16) -> Any:
    """The transformer of `case`, cut as it says."""
    cuts = {"num_layers": case.layers, "num_attention_heads": case.heads}
    if not case.model.startswith("qwen"):
        cuts["num_single_layers"] = case.single
    given = {name: number for name, number in cuts.items() if number is not None}
    return named_model(case.model, device=device, dtype=dtype, **given)


def with_cache(pipe: Any) -> Any:
    """Klein-KV around the components of a Klein pipeline; its attention processors do as before without a cache."""
    made = diffusers.Flux2KleinKVPipeline(
        scheduler=pipe.scheduler, vae=pipe.vae, text_encoder=None, tokenizer=None, transformer=pipe.transformer
    )
    made.set_progress_bar_config(disable=True)
    return made


def embeddings(pipe: Any, seed: int = 1, text_tokens: int = TEXT_TOKENS) -> dict[str, torch.Tensor]:
    """A random prompt, as the pipeline's own arguments."""
    config, random = pipe.transformer.config, torch.Generator().manual_seed(seed)
    drawn = {"prompt_embeds": torch.randn(1, text_tokens, config.joint_attention_dim, generator=random)}
    if isinstance(pipe, diffusers.FluxKontextPipeline):
        drawn["pooled_prompt_embeds"] = torch.randn(1, config.pooled_projection_dim, generator=random)
    given = {name: value.to(pipe.transformer.device, pipe.transformer.dtype) for name, value in drawn.items()}
    if isinstance(pipe, diffusers.QwenImageEditPlusPipeline):
        mask = torch.ones(1, text_tokens, dtype=torch.long, device=pipe.transformer.device)
        given |= {"prompt": None, "prompt_embeds_mask": mask}
    return given


def own_arguments(pipe: Any, side: int) -> dict[str, Any]:
    """What this pipeline needs besides prompt and images, for an output of `side` x `side` pixels."""
    if isinstance(pipe, diffusers.FluxKontextPipeline):
        return {"max_area": side * side, "_auto_resize": False}
    if isinstance(pipe, diffusers.QwenImageEditPlusPipeline):
        return {"true_cfg_scale": 1.0}
    return {"guidance_scale": 1.0} if isinstance(pipe, diffusers.Flux2KleinPipeline) else {}


def caller(pipe: Any, case: PipelineCase) -> Callable[..., Any]:
    """``call(steps=case.steps, side=case.side) -> numpy images``: one whole ``pipe()`` call, the same every time."""
    prompt = embeddings(pipe, text_tokens=case.text_tokens)

    def call(steps: int = case.steps, side: int = case.side) -> Any:
        images = photos(case.references, side)
        with _references_of(side):
            return pipe(
                **prompt, **own_arguments(pipe, side), image=images[0] if case.model == "kontext" else images,
                height=side, width=side, num_inference_steps=steps, num_images_per_prompt=case.batch,
                output_type="np", generator=torch.Generator().manual_seed(2),
            ).images  # fmt: skip

    return call


@contextlib.contextmanager
def _references_of(side: int) -> Iterator[None]:
    """Qwen-Image-Edit-Plus makes every reference a million pixels; inside, `side` x `side`."""
    published = pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = side * side
    try:
        yield
    finally:
        pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = published


def photos(count: int, side: int) -> list[PIL.Image.Image]:
    """The bundled photo in `count` orientations, of which there are eight."""
    with resources.files("sparse_ref_attn").joinpath("assets/photo.jpg").open("rb") as file:
        photo = open_image(file).resize((side, side))
    turns = (None, *PIL.Image.Transpose)
    if count > len(turns):
        raise ValueError(f"there are {len(turns)} different references, got {count}")
    return [photo if turn is None else photo.transpose(turn) for turn in turns[:count]]
