"""A tiny GLM-Image: its prior of visual tokens is given, and the model that would make it is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from tests import tiny_models
from tests.copies import copies
from tests.pictures import generator, picture

CODES = 64  # of the prior
CELL = 8  # pixels of a token's side
SIZES = ((64, 32), (32, 48))  # (width, height) of the references
PROMPTS = ("a sign 'on'", "a long 'road'")


@copies
def build() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=32, condition_dim=16, prior_vq_quantizer_codebook_size=CODES,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        sample_size=32, block_out_channels=(4, 4, 4), layers_per_block=0, latent_channels=4, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, use_quant_conv=False,
        mid_block_add_attention=False, use_post_quant_conv=False, latents_mean=[0.1] * 4, latents_std=[0.7] * 4,
    )  # fmt: skip
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipe = diffusers.GlmImagePipeline(
        tokenizer=ByT5Tokenizer(), processor=None, text_encoder=T5EncoderModel(config), vision_language_encoder=None,
        vae=vae, transformer=transformer, scheduler=tiny_models.scheduler(),
    )  # fmt: skip
    return tiny_models.ready(pipe, 0)


def _prior(width: int, height: int, seed: int) -> torch.Tensor:
    return torch.randint(0, CODES, ((width // CELL) * (height // CELL),), generator=generator(seed))


def arguments(
    batch: int = 1, images: int = 1, sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0, guided: bool = False,
    steps: int = 3, side: int = 48,
) -> dict[str, Any]:  # fmt: skip
    """Of a call with references of these `sizes` for each of `batch` prompts, others for each."""
    given: dict[str, Any] = {
        "prompt": list(PROMPTS[:batch]), "height": side, "width": side, "num_inference_steps": steps,
        "num_images_per_prompt": images, "guidance_scale": 2.0 if guided else 1.0, "generator": generator(seed),
        "prior_token_ids": torch.stack([_prior(side, side, 50 + i) for i in range(batch)]),
    }  # fmt: skip
    if not sizes:
        return given
    pictures = [[picture(*size, seed + 10 * i + j) for j, size in enumerate(sizes)] for i in range(batch)]
    priors = [torch.cat([_prior(*size, seed + 9 * i + j) for j, size in enumerate(sizes)]) for i in range(batch)]
    grid = torch.tensor([[1, height // CELL, width // CELL] for width, height in sizes])
    return given | {
        "image": pictures, "prior_token_image_ids": priors, "source_image_grid_thw": [grid] * batch,
    }  # fmt: skip


def call(pipe: Any, **which: Any) -> np.ndarray:
    """Latents of the pictures."""
    return pipe(**arguments(**which), output_type="latent").images.numpy()
