"""CLIP and DINOv2 in folders of transformers' format, and SigLIP 2, tiny, with seeded random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tests.text_encoders import clip as clip_text

SIZE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_clip(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """Of width 32, on pictures of 32 x 32."""
    torch.manual_seed(0)
    tokenizer, _ = clip_text()
    text = {**SIZE, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZE, "image_size": 32, "patch_size": 8})).eval()
    processor = CLIPProcessor(_pictures(), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def save_dino(folder: Path) -> None:
    """Of width 32, on pictures of 32 x 32."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SIZE, image_size=32, patch_size=8)).eval().save_pretrained(folder)
    _pictures().save_pretrained(folder)


def siglip2() -> tuple[Siglip2ImageProcessorPil, Siglip2VisionModel]:
    """Of width 16, on pictures of at most 16 patches of 16 x 16, whatever their shape."""
    model = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_patches=16,
            patch_size=16,
        )
    )  # fmt: skip
    return Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16), model


def _pictures() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
