"""A tiny Qwen-Image-2.1, whose VAE makes one token of 16 x 16 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from transformers import BatchFeature

from tests import text_encoders, tiny_models
from tests.copies import copies
from tests.pictures import generator, picture

SIZES = ((192, 128), (64, 64))  # (width, height) of the references, which become 160 x 96 and 128 x 128
PROMPTS = ("a cat", "two dogs beside a red kite")
_CHANNELS = 8


class Processor(text_encoders.Qwen3VLProcessor):
    """As `Qwen3VLProcessor`, of several prompts with as many pictures each."""

    def apply_chat_template(self, messages: list[dict[str, Any]], **settings: Any) -> list[list[int]]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return [self.tokenizer(text).input_ids]

    def __call__(self, text: list[str], images: Any = None, **settings: Any) -> BatchFeature:
        if not images:
            return super().__call__(text, **settings)
        features = self.image_processor(images=images, return_tensors="pt")
        counts = (features["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist()
        expanded = []
        for prompt in text:
            head, *tails = prompt.split("<|image_pad|>")
            expanded.append(head + "".join("<|image_pad|>" * counts.pop(0) + tail for tail in tails))
        tokens = self.tokenizer(expanded, **settings)
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return BatchFeature({**features, **tokens, "mm_token_type_ids": (tokens["input_ids"] == pad).int()})


@copies
def build() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=_CHANNELS, out_channels=_CHANNELS, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=_CHANNELS, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=0,
        latents_mean=[0.1] * _CHANNELS, latents_std=[0.7] * _CHANNELS,
    )  # fmt: skip
    tokenizer, processor, encoder = text_encoders.qwen3_vl()
    pipe = diffusers.QwenImage21Pipeline(
        scheduler=tiny_models.scheduler(), vae=vae, text_encoder=encoder,
        processor=Processor(processor.image_processor, tokenizer), transformer=transformer,
    )  # fmt: skip
    return tiny_models.ready(pipe, 0)


def call(
    pipe: Any, batch: int = 1, images: int = 1, sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0,
    guided: bool = False, steps: int = 3, side: int = 96, **more: Any,
) -> np.ndarray:  # fmt: skip
    """Latents of a call with references of these `sizes` for all of `batch` prompts."""
    given: dict[str, Any] = {
        "prompt": list(PROMPTS[:batch]), "height": side, "width": side, "num_inference_steps": steps,
        "num_images_per_prompt": images, "generator": generator(seed), "output_resolution": 128,
        "output_type": "latent", "image": [picture(*size, seed + i) for i, size in enumerate(sizes)] or None,
    }  # fmt: skip
    if guided:
        given |= {"negative_prompt": ["dark and long"] * batch, "true_cfg_scale": 2.0}
    return pipe(**given | more).images.numpy()
