"""Tokenizers and text encoders of the tiny pipelines, built offline: byte-level vocabularies, seeded random weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    BatchFeature,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Content is a string for Qwen3, and a list of {"type": "text", "text": ...} for Mistral.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDE_INIT = 0.3  # the usual 0.02 leaves a tiny encoder's states so small that the prompt hardly matters


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that GPT-2's byte-level tokenizers use."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def byte_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE without merges: one token a byte, Qwen's special tokens, a chat template."""
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *byte_alphabet()])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = CHAT
    return tokenizer


def clip() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """CLIP text encoder of width 32 (77 tokens at most)."""
    alphabet = byte_alphabet()
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(letter + "</w>" for letter in alphabet)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=32, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=77, hidden_act="gelu",
        projection_dim=32,
    )  # fmt: skip
    return tokenizer, CLIPTextModel(config)


def t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """T5 encoder of width 32, one token a character."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(chr(code), -3.0) for code in range(33, 127)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4,
        relative_attention_num_buckets=8,
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config)


def qwen3() -> tuple[Qwen2Tokenizer, Qwen3ForCausalLM]:
    """Qwen3 of width 16 with three layers (the three that FLUX.2 Klein stacks)."""
    tokenizer = byte_tokenizer()
    config = Qwen3Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=WIDE_INIT,
    )  # fmt: skip
    return tokenizer, Qwen3ForCausalLM(config)


def mistral3() -> tuple[Qwen2Tokenizer, Mistral3ForConditionalGeneration]:
    """Mistral3 of width 16 with three layers; FLUX.2 feeds it text alone, so its tokenizer needs no image part."""
    tokenizer = byte_tokenizer()
    config = Mistral3Config(
        text_config={
            "model_type": "mistral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer),
            "max_position_embeddings": 512, "initializer_range": WIDE_INIT,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )  # fmt: skip
    return tokenizer, Mistral3ForConditionalGeneration(config)


class QwenVLProcessor(Qwen2VLProcessor):
    """Qwen2VLProcessor for text and images alone: the published one also demands a video processor (torchvision)."""

    def __init__(self, image_processor: Qwen2VLImageProcessorPil, tokenizer: Qwen2Tokenizer) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text: list[str], images: Any, padding: bool = True, return_tensors: str = "pt") -> BatchFeature:
        features = self.image_processor(images=images, return_tensors="pt")
        counts = [int(grid.prod()) // self.image_processor.merge_size**2 for grid in features["image_grid_thw"]]
        expanded = []
        for prompt in text:
            head, *tails = prompt.split("<|image_pad|>")
            if len(tails) != len(counts):
                raise ValueError(f"each prompt must name {len(counts)} images, got {len(tails)} in {prompt!r}")
            expanded.append(head + "".join("<|image_pad|>" * n + tail for n, tail in zip(counts, tails, strict=True)))
        tokens = self.tokenizer(expanded, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**features, **tokens})


class Qwen3VLProcessor(QwenVLProcessor):
    """As Qwen's newer processors, says which tokens are a picture's; a prompt may name none."""

    def __call__(self, text: list[str], images: Any = None, **settings: Any) -> BatchFeature:
        inputs = super().__call__(text, images, **settings) if images else self.tokenizer(text, **settings)
        picture = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return BatchFeature({**inputs, "mm_token_type_ids": (inputs["input_ids"] == picture).int()})


def qwen_vl() -> tuple[Qwen2Tokenizer, QwenVLProcessor, Qwen2_5_VLForConditionalGeneration]:
    """Qwen2.5-VL of width 16 (a layer each for text and vision)."""
    tokenizer = byte_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 4096,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1e6, "initializer_range": WIDE_INIT, "bos_token_id": None, "eos_token_id": None,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [0],
            "window_size": 112, "initializer_range": WIDE_INIT,
        },
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
    )  # fmt: skip
    processor = QwenVLProcessor(Qwen2VLImageProcessorPil(), tokenizer)
    return tokenizer, processor, Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> tuple[Qwen2Tokenizer, Qwen3VLProcessor, Qwen3VLForConditionalGeneration]:
    """Qwen3-VL of width 16 (a layer each for text and vision)."""
    tokenizer = byte_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "initializer_range": WIDE_INIT, "bos_token_id": None, "eos_token_id": None,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            "initializer_range": WIDE_INIT,
        },
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
    )  # fmt: skip
    processor = Qwen3VLProcessor(Qwen2VLImageProcessorPil(patch_size=16), tokenizer)
    return tokenizer, processor, Qwen3VLForConditionalGeneration(config)
