"""A tiny Z-Image-Omni, and where its rows lie, found without the library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests import text_encoders, tiny_models, vision_models
from tests.copies import copies
from tests.pictures import picture


@copies
def build() -> Any:
    """The VAE makes one token of 8 x 8 pixels, SigLIP one of 16 x 16 of a picture that it makes 64 x 64 or the like."""
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        siglip_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    for token in ("x_pad_token", "cap_pad_token", "siglip_pad_token"):
        torch.nn.init.normal_(getattr(transformer, token))
    vae = diffusers.AutoencoderKL(
        sample_size=32, block_out_channels=(4, 4, 4), layers_per_block=0, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=2,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609,
        scaling_factor=1.5035,
    ).to(torch.bfloat16)  # fmt: skip
    tokenizer, encoder = text_encoders.qwen3()
    processor, siglip = vision_models.siglip2()
    pipe = diffusers.ZImageOmniPipeline(
        scheduler=tiny_models.scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer,
        siglip=siglip, siglip_processor=processor,
    )  # fmt: skip
    return tiny_models.ready(pipe, 0)


def arguments(seed: int) -> dict[str, Any]:
    """Pictures whose tokens are padded, and a generation whose tokens are not."""
    pictures = [picture(80, 64, seed), picture(72, 72, seed + 1)]
    return {"image": pictures, "prompt": "a cat", "height": 64, "width": 64, "guidance_scale": 0.0}


def padded(rows: int) -> int:
    while rows % 32:
        rows += 1
    return rows


def pictures_rows(given: dict[str, Any], item: int) -> Iterator[tuple[int, bool]]:
    """Of each row that the model makes of an item's pictures, which picture it is of, and whether it is a token."""
    for number, latents in enumerate(given["x"][item]):
        tokens = latents[0, 0].numel() // 4
        yield from ((number, row < tokens) for row in range(padded(tokens)))


def words(given: dict[str, Any], item: int) -> int:
    return sum(padded(len(caption)) for caption in given["cap_feats"][item])


def features(given: dict[str, Any], item: int) -> int:
    own = given["siglip_feats"][item]
    return 0 if own is None else sum(32 if each is None else padded(each[..., 0].numel()) for each in own)


def stays(given: dict[str, Any], kept: Tensor, item: int = 0) -> list[bool]:
    """Of each row of an item's pictures, whether it stays where the reference tokens `kept` (R,) do."""
    last, tokens = len(given["x"][item]) - 1, iter(kept.tolist())
    return [next(tokens) if token and number < last else True for number, token in pictures_rows(given, item)]


def seen(given: dict[str, Any], kept: Tensor) -> dict[int, Tensor]:
    """What attentions over n keys see, by n: the pictures alone, all of an item, words alone, features alone."""
    items = range(len(given["x"]))
    lengths, own = [words(given, i) for i in items], [features(given, i) for i in items]
    pictures = [torch.tensor(stays(given, kept, i)) for i in items]
    rows = max(a + len(x) + b for a, x, b in zip(lengths, pictures, own, strict=True))
    joint = torch.ones(len(items), rows, dtype=torch.bool)
    for i, x in enumerate(pictures):
        joint[i, lengths[i] : lengths[i] + len(x)] = x
    alone = {n: torch.ones(n, dtype=torch.bool) for n in (max(lengths), max(own)) if n}
    return {**alone, len(pictures[0]): pictures[0], rows: joint}
