"""Real diffusers pipelines around a transformer of real width: random weights, prompts given as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

import diffusers
import PIL.Image
import torch

from sparse_ref_attn.adapters.geometries import named_model

from .shapes import TEXT_TOKENS, PipelineCase

__all__ = ["build", "caller", "embeddings", "photos"]

# Eight times smaller in space as the published VAEs are, and so narrow that it hardly takes time.
_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "mid_block_add_attention": False,
}


def build(case: PipelineCase, device: torch.device, dtype: torch.dtype, real_depth: bool = False) -> Any:
    """The pipeline of `case`; weights are drawn from seed 0.

    Parameters
    ----------
    case : PipelineCase
    device : torch.device
    dtype : torch.dtype
        Of every component.
    real_depth : bool
        Keep the published number of blocks instead of the case's.
    """
    torch.manual_seed(0)
    depth = {} if real_depth else {"num_layers": case.layers, "num_single_layers": case.single}
    transformer = named_model(case.model, device=device, dtype=dtype, **depth)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if case.model == "kontext":
        vae = diffusers.AutoencoderKL(latent_channels=16, shift_factor=0.1159, scaling_factor=0.3611, **_VAE)
        pipe = diffusers.FluxKontextPipeline(
            scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
            transformer=transformer,
        )  # fmt: skip
    else:
        vae = diffusers.AutoencoderKLFlux2(latent_channels=32, **_VAE)
        pipe = diffusers.Flux2KleinPipeline(
            scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer, is_distilled=True
        )
    vae.to(device, dtype).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(pipe: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """A random prompt, as the pipeline's own arguments."""
    config, random = pipe.transformer.config, torch.Generator().manual_seed(seed)
    drawn = {"prompt_embeds": torch.randn(1, TEXT_TOKENS, config.joint_attention_dim, generator=random)}
    if isinstance(pipe, diffusers.FluxKontextPipeline):
        drawn["pooled_prompt_embeds"] = torch.randn(1, config.pooled_projection_dim, generator=random)
    return {name: value.to(pipe.transformer.device, pipe.transformer.dtype) for name, value in drawn.items()}


def caller(pipe: Any, case: PipelineCase) -> Callable[..., Any]:
    """``call(steps=case.steps, side=case.side) -> numpy images``: one whole ``pipe()`` call, the same every time."""
    prompt = embeddings(pipe)

    def call(steps: int = case.steps, side: int = case.side) -> Any:
        images = photos(case.references, side)
        if case.model == "kontext":
            own = {"image": images[0], "max_area": side * side, "_auto_resize": False}
        else:
            own = {"image": images}
            if isinstance(pipe, diffusers.Flux2KleinPipeline):
                own["guidance_scale"] = 1.0
        return pipe(
            **prompt, **own, height=side, width=side, num_inference_steps=steps, output_type="np",
            generator=torch.Generator().manual_seed(2),
        ).images  # fmt: skip

    return call


def photos(count: int, side: int) -> list[PIL.Image.Image]:
    """The bundled photo in `count` orientations."""
    with resources.files("sparse_ref_attn").joinpath("assets/photo.jpg").open("rb") as file:
        photo = PIL.Image.open(file).convert("RGB").resize((side, side))
    turns = (None, PIL.Image.Transpose.ROTATE_90, PIL.Image.Transpose.ROTATE_180, PIL.Image.Transpose.ROTATE_270)
    return [photo if turn is None else photo.transpose(turn) for turn in turns[:count]]
