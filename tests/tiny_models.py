"""Tiny real diffusers pipelines with seeded random weights, built offline.

Nothing is downloaded and nothing is mocked: the classes are diffusers' own, only their sizes are small. VAEs have no
more blocks than they need, and text encoders one layer, for most of a tiny call would be theirs. Weights are drawn so
that the picture depends visibly on every reference (at the default initialisation it hardly does).
Each function here returns ``build(seed=0, layers=2, single=2, heads=2, head_dim=16) -> pipe``: `layers` double-stream
and `single` single-stream blocks, `heads` of `head_dim` channels (a multiple of 16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from tests import text_encoders
from tests.copies import copies

LATENT_CHANNELS = 4
_GAINS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True)


def _rope_axes(head_dim: int, axes: int) -> tuple[int, ...]:
    """`head_dim` split into even parts, the first (which image) the smallest of three, or four alike."""
    if head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}")
    return (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8) if axes == 3 else (head_dim // 4,) * 4


def enliven(transformer: torch.nn.Module, seed: int) -> None:
    """Redraw the linear layers at unit gain, and sharpen attention."""
    random = torch.Generator("cpu").manual_seed(seed + 1)
    with torch.no_grad():
        for module in transformer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5, generator=random)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=random)
    sharpen(transformer, 1.5)


def sharpen(transformer: torch.nn.Module, gain: float) -> None:
    """Multiply the gains of the query and key norms; by 0, attention looks everywhere alike."""
    with torch.no_grad():
        for name, module in transformer.named_modules():
            if name.rsplit(".", 1)[-1] in _GAINS and module.weight is not None:  # GLM-Image's norms have none
                module.weight.mul_(gain)


def ready(pipe: Any, seed: int) -> Any:
    enliven(pipe.transformer, seed)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe


def kontext(pipeline: type) -> Callable[..., Any]:
    """FLUX.1 Kontext and its inpainting form; the VAE makes one token of 4 x 4 pixels."""

    @copies
    def build(seed: int = 0, layers: int = 2, single: int = 2, heads: int = 2, head_dim: int = 16) -> Any:
        torch.manual_seed(seed)
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=layers, num_single_layers=single,
            attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=32,
            pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=_rope_axes(head_dim, 3),
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            sample_size=32, block_out_channels=(4, 4), layers_per_block=0, latent_channels=LATENT_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
            shift_factor=0.0609, scaling_factor=1.5035,
        )  # fmt: skip
        (tokenizer, clip), (tokenizer_2, t5) = text_encoders.clip(), text_encoders.t5()
        pipe = pipeline(
            scheduler=scheduler(), vae=vae, text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5,
            tokenizer_2=tokenizer_2, transformer=transformer,
        )  # fmt: skip
        return ready(pipe, seed)

    return build


def flux2(pipeline: type, text_encoder: Callable[[], tuple], guidance: bool = False) -> Callable[..., Any]:
    """FLUX.2 dev and Klein; the VAE makes one token of 8 x 8 pixels (references must have 64 pixels a side)."""

    @copies
    def build(seed: int = 0, layers: int = 2, single: int = 2, heads: int = 2, head_dim: int = 16) -> Any:
        torch.manual_seed(seed)
        transformer = diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=layers, num_single_layers=single,
            attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=48,
            timestep_guidance_channels=32, axes_dims_rope=_rope_axes(head_dim, 4), guidance_embeds=guidance,
        )  # fmt: skip
        vae = diffusers.AutoencoderKLFlux2(
            sample_size=32, block_out_channels=(4, 4, 4), layers_per_block=0, latent_channels=LATENT_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=2, mid_block_add_attention=False,
        )  # fmt: skip
        tokenizer, encoder = text_encoder()
        pipe = pipeline(
            scheduler=scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer
        )
        pipe.system_message = "edit"  # FLUX.2 dev's own is longer than the tests' prompts may be
        return ready(pipe, seed)

    return build


def qwen(pipeline: type, zero_cond_t: bool = False) -> Callable[..., Any]:
    """Qwen-Image-Edit, -Plus, and with `zero_cond_t` its 2511 form; the VAE makes one token of 8 x 8 pixels."""

    @copies
    def build(seed: int = 0, layers: int = 2, single: int = 2, heads: int = 2, head_dim: int = 16) -> Any:
        """`single` is accepted for the common signature; Qwen has no single-stream blocks."""
        torch.manual_seed(seed)
        transformer = diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=layers,
            attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=16,
            axes_dims_rope=_rope_axes(head_dim, 3), zero_cond_t=zero_cond_t,
        )  # fmt: skip
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 1, 1], num_res_blocks=0,
            temperal_downsample=[False, True], latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        )  # fmt: skip
        with torch.no_grad():  # inpainting samples what it encodes: a trained VAE is as good as sure of it
            vae.quant_conv.weight[LATENT_CHANNELS:] = 0
            vae.quant_conv.bias[LATENT_CHANNELS:] = -30
            for part in (vae.quant_conv.weight, vae.quant_conv.bias):
                part[:LATENT_CHANNELS] *= 14  # the spread of a trained VAE's latents
            # Pictures about grey and of some contrast, for a nearly grey one hides differences.
            vae.decoder.conv_out.weight *= 4
            vae.decoder.conv_out.bias -= vae.decoder(torch.zeros(1, LATENT_CHANNELS, 1, 8, 8)).mean((0, 2, 3, 4))
        tokenizer, processor, encoder = text_encoders.qwen_vl()
        pipe = pipeline(
            scheduler=scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, processor=processor,
            transformer=transformer,
        )  # fmt: skip
        # The pipeline drops the template's head by its length under the published tokenizer; ours has a token a byte.
        head, role, _ = pipe.prompt_template_encode.partition("<|im_start|>user\n")
        tokens = tokenizer(head + role).input_ids
        pipe.prompt_template_encode_start_idx = len(tokens)
        return ready(pipe, seed)

    return build


def longcat(pipeline: type) -> Callable[..., Any]:
    """LongCat-Image-Edit; the VAE makes one token of 8 x 8 pixels, in the pipeline's own 16 channels."""

    @copies
    def build(seed: int = 0, layers: int = 2, single: int = 2, heads: int = 2, head_dim: int = 16) -> Any:
        torch.manual_seed(seed)
        transformer = diffusers.LongCatImageTransformer2DModel(
            in_channels=64, num_layers=layers, num_single_layers=single, attention_head_dim=head_dim,
            num_attention_heads=heads, joint_attention_dim=16, pooled_projection_dim=16,
            axes_dims_rope=_rope_axes(head_dim, 3),
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            sample_size=32, block_out_channels=(4, 4, 4), layers_per_block=0, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=2,
            mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609,
            scaling_factor=1.5035,
        )  # fmt: skip
        tokenizer, processor, encoder = text_encoders.qwen_vl()
        pipe = pipeline(
            scheduler=scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, text_processor=processor,
            transformer=transformer,
        )  # fmt: skip
        pipe.tokenizer_max_length = 32  # to which every prompt is padded
        return ready(pipe, seed)

    return build
