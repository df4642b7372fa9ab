"""A tiny LTX-2 with a keyframe and a reference video of two latent frames; the VAE makes a token of 8 x 8 pixels."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

from tests import text_encoders, tiny_models
from tests.copies import copies
from tests.pictures import picture

__all__ = ["GUIDED", "arguments", "build", "video"]

CHANNELS = 4
_GUIDANCE = {f"{audio}{kind}_scale": 1.0 for audio in ("", "audio_") for kind in ("guidance", "modality")}
_GUIDANCE |= {"stg_scale": 0.0, "audio_stg_scale": 0.0}
GUIDED = {
    "negative_prompt": "dark", "guidance_scale": 3.0, "audio_guidance_scale": 3.0, "stg_scale": 1.0,
    "spatio_temporal_guidance_blocks": [1], "modality_scale": 2.0, "audio_modality_scale": 2.0,
}  # fmt: skip
"""Both prompts in one call, then one whose second block does not attend, and one whose sound does not look."""


@copies
def build(pipeline: type = diffusers.LTX2InContextPipeline, **changes: Any) -> Any:
    """`changes` are fields of the transformer's config."""
    torch.manual_seed(0)
    tokenizer, encoder = text_encoders.qwen3()
    width, depth = encoder.config.hidden_size, encoder.config.num_hidden_layers
    rope = {"rope_double_precision": False, "rope_type": "split"}
    sizes: dict[str, Any] = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 3, "caption_channels": width,
        "vae_scale_factors": (8, 8, 8), "base_height": 64, "base_width": 64, "perturbed_attn": True, **rope,
    }  # fmt: skip
    transformer = diffusers.LTX2VideoTransformer3DModel(**sizes | changes)
    down = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=CHANNELS, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, downsample_type=down,
        upsample_residual=(False,) * 3, upsample_factor=(1,) * 3, patch_size=1, decoder_causal=False,
        spatial_compression_ratio=8, temporal_compression_ratio=8,
    )  # fmt: skip
    sound = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    connectors = {
        f"{kind}_connector_{name}": value
        for kind, channels in (("video", 8), ("audio", 8))
        for name, value in {
            "num_attention_heads": 2, "attention_head_dim": channels, "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }  # fmt: skip
    pipe = pipeline(
        scheduler=tiny_models.scheduler(), vae=vae, audio_vae=sound, text_encoder=encoder, tokenizer=tokenizer,
        connectors=LTX2TextConnectors(
            caption_channels=width, text_proj_in_factor=depth + 1, connector_rope_base_seq_len=64, **connectors, **rope
        ),
        transformer=transformer,
        vocoder=LTX2Vocoder(
            in_channels=16, hidden_channels=16, upsample_kernel_sizes=[4], upsample_factors=[2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1]],
        ),
    )  # fmt: skip
    return tiny_models.ready(pipe, 0)


def video(seed: int, frames: int = 9) -> list[Any]:
    """A disc and a bar that jump."""
    return [picture(64, 64, 100 * seed + i) for i in range(frames)]


def arguments(seed: int) -> dict[str, Any]:
    """A video of two latent frames, a keyframe at the second, and a reference of half its side; no guidance."""
    keyframe = LTX2VideoCondition(frames=picture(64, 64, seed), index=1, crf=0)
    return {
        "prompt": "a cat", "height": 64, "width": 64, "num_frames": 9, "frame_rate": 24.0, "max_sequence_length": 24,
        "conditions": [keyframe], "reference_conditions": [LTX2ReferenceCondition(frames=video(seed))],
        "reference_downscale_factor": 2, **_GUIDANCE,
    }  # fmt: skip
