"""The small FLUX.1 Kontext pipeline: diffusers' own classes at a small size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, VersionError
from ..patching.trained import told
from .words import WIDTH, seeded, text_encoders

__all__ = ["LATENTS", "TRAINED", "WEIGHTS", "build_transformer", "build_vae", "knows_open_scenery", "toy_pipeline"]

LATENTS = 16  # channels
WEIGHTS = Path(__file__).parent.parent / "assets" / "toy"
TRAINED = str(WEIGHTS / "transformer")
"""Folder of the transformer that ships in the package."""


def build_vae(seed: int = 0) -> Any:
    """An untrained ``AutoencoderTiny`` (convolutions only) whose latents have a quarter of the picture's side."""
    from diffusers import AutoencoderTiny

    with seeded(seed):
        return AutoencoderTiny(
            encoder_block_out_channels=(32, 32, 32), decoder_block_out_channels=(32, 32, 32), latent_channels=LATENTS,
            num_encoder_blocks=(0, 1, 2), num_decoder_blocks=(2, 1, 0), scaling_factor=1.0, shift_factor=0.0,
        )  # fmt: skip


def build_transformer(seed: int = 0) -> Any:
    """An untrained ``FluxTransformer2DModel``; each block begins as the identity (adaLN-zero)."""
    from diffusers import FluxTransformer2DModel

    with seeded(seed), torch.no_grad():
        model: Any = FluxTransformer2DModel(
            patch_size=1, in_channels=4 * LATENTS, num_layers=2, num_single_layers=4, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False,
            axes_dims_rope=(4, 14, 14),
        )  # fmt: skip
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                if (".norm" in name and name.endswith("linear")) or name in ("norm_out.linear", "proj_out"):
                    module.weight.zero_()
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
    return model


def knows_open_scenery(transformer: str) -> bool:
    """Whether a transformer was trained on prompts that leave the scenery open.

    By what ``sra train`` writes beside the weights; where nothing is said it was not.
    """
    return bool(told(transformer).get("open_scenery"))


def toy_pipeline(transformer: str | None = TRAINED, *, seed: int = 0) -> Any:
    """The small pipeline, trained: autoencoder and transformer ship in the package.

    It is for the procedural task of ``sparse_ref_attn.toy`` and nothing else: its prompts are words of
    ``sparse_ref_attn.toy.words``, its pictures 128 x 128 pixels (256 tokens), and two references stand side by side in
    one picture of 256 x 128.

    Parameters
    ----------
    transformer : str, optional
        Folder of trained weights: the one that ships, or the ``transformer`` that ``sra train`` writes. None: an
        untrained transformer.
    seed : int
        Of untrained weights. The global random stream is left as it was.

    Returns
    -------
    diffusers.FluxKontextPipeline
        float32, on the CPU, in eval mode.

    Raises
    ------
    ConfigError
        If the folder holds no transformer.
    VersionError
        If diffusers or transformers is not installed.

    Examples
    --------
    >>> from PIL import Image
    >>> pipe = toy_pipeline()
    >>> pipe.set_progress_bar_config(disable=True)
    >>> picture = pipe(
    ...     prompt="swap rows red to-blue", image=Image.new("RGB", (64, 64), "green"), height=64, width=64,
    ...     max_area=64 * 64, _auto_resize=False, max_sequence_length=16, num_inference_steps=2).images[0]
    >>> picture.size
    (64, 64)
    """
    try:
        import transformers  # noqa: F401 -- diffusers imports without it, and then has no pipelines
        from diffusers import (
            AutoencoderTiny,
            FlowMatchEulerDiscreteScheduler,
            FluxKontextPipeline,
            FluxTransformer2DModel,
        )
    except ImportError as error:
        raise VersionError(
            "the small pipeline needs diffusers and transformers: pip install 'sparse-ref-attn[diffusers]'"
        ) from error
    if transformer is None:
        model = build_transformer(seed)
    elif not (Path(transformer) / "config.json").is_file():
        raise ConfigError(f"a transformer's folder must hold config.json, got {transformer}")
    else:
        model = FluxTransformer2DModel.from_pretrained(transformer, torch_dtype=torch.float32)
    vae: Any = AutoencoderTiny.from_pretrained(str(WEIGHTS / "vae"), torch_dtype=torch.float32)
    for part in (model, vae):
        part.eval().requires_grad_(False)
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0), vae=vae, transformer=model, **text_encoders()
    )
