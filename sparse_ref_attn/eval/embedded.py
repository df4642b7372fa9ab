"""A real FLUX.1 Kontext pipeline that needs no download: diffusers' own classes, random weights.

It shows the speed and the mechanics of token dropping. **Its weights are random, so its pictures mean nothing**: what
it keeps or loses says nothing about any trained model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, VersionError

__all__ = ["SIZES", "Size", "kontext_pipeline"]

LATENT_CHANNELS = 16  # FLUX's own
TEXT_WIDTH = 64


@dataclass(frozen=True)
class Size:
    """How large an embedded pipeline is.

    Parameters
    ----------
    side : int
        Side in pixels of the picture it is meant for.
    text : int
        Text tokens: ``max_sequence_length`` of the calls it is meant for.
    heads, head_dim, double, single : int
        Of the transformer: H, C, double-stream and single-stream blocks.
    vae : tuple of int
        Channels of the VAE at each resolution; n of them make tokens of 2^n x 2^n pixels.
    """

    side: int
    text: int
    heads: int
    head_dim: int
    double: int
    single: int
    vae: tuple[int, ...]

    @property
    def pixels_per_token(self) -> int:
        """Side of a token in pixels."""
        return int(2 ** len(self.vae))


SIZES = {
    "large": Size(side=512, text=128, heads=8, head_dim=64, double=2, single=6, vae=(4, 4, 8, 8)),
    "tiny": Size(side=32, text=32, heads=2, head_dim=16, double=1, single=2, vae=(8, 8)),
}


def kontext_pipeline(size: str = "large", seed: int = 0) -> Any:
    """A ``FluxKontextPipeline`` with seeded random weights, built offline.

    Its classes are diffusers' and transformers' own (``FluxTransformer2DModel``, ``AutoencoderKL``, CLIP and T5 text
    encoders, ``FlowMatchEulerDiscreteScheduler``); only its sizes are small. The weights are random, so its pictures
    mean nothing. They do depend on the prompt, the seed and the reference.

    Parameters
    ----------
    size : {"large", "tiny"}
        "large" makes 512 x 512 pictures of 1,024 tokens, with as many for the reference, and takes seconds on a CPU;
        "tiny" makes 32 x 32 pictures of 64 tokens in milliseconds. Call it with the fields ``side`` and ``text`` of
        ``SIZES[size]``, as below: the pipeline's own defaults are those of the published model, one megapixel.
    seed : int
        Of the weights. The global random stream is left as it was.

    Returns
    -------
    diffusers.FluxKontextPipeline
        On the CPU, float32, in eval mode, 36 million transformer parameters ("tiny": 0.1 million).

    Raises
    ------
    ConfigError
        For an unknown size.
    VersionError
        If diffusers or transformers is not installed.

    Examples
    --------
    >>> from PIL import Image
    >>> pipe = kontext_pipeline("tiny")
    >>> pipe.set_progress_bar_config(disable=True)
    >>> picture = pipe(
    ...     prompt="a cup", image=Image.new("RGB", (32, 32), "red"), height=32, width=32, max_area=32 * 32,
    ...     _auto_resize=False, max_sequence_length=16, num_inference_steps=2,
    ...     generator=torch.Generator().manual_seed(0)).images[0]
    >>> picture.size
    (32, 32)
    """
    if size not in SIZES:
        raise ConfigError(f"size must be one of {', '.join(map(repr, SIZES))}, got {size!r}")
    try:
        import diffusers
        import transformers  # noqa: F401 -- diffusers imports without it, and then has no pipelines
    except ImportError as error:
        raise VersionError(
            "the embedded pipeline needs diffusers and transformers: pip install 'sparse-ref-attn[diffusers]'"
        ) from error
    with _seeded(seed):
        pipe = _build(diffusers, SIZES[size])
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    return pipe


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, the CPU's global random stream starts at `seed`; afterwards it is what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _build(diffusers: Any, size: Size) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=size.double, num_single_layers=size.single,
        attention_head_dim=size.head_dim, num_attention_heads=size.heads, joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH, guidance_embeds=True,
        axes_dims_rope=(size.head_dim // 4, 3 * size.head_dim // 8, 3 * size.head_dim // 8),
    )  # fmt: skip
    levels = len(size.vae)
    vae = diffusers.AutoencoderKL(
        sample_size=size.side, block_out_channels=size.vae, layers_per_block=1, latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=2.0, shift_factor=0.0,
    )  # fmt: skip
    _enliven(transformer)
    clip, t5 = _clip(), _t5(size.text)
    return diffusers.FluxKontextPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae, transformer=transformer, tokenizer=clip[0], text_encoder=clip[1], tokenizer_2=t5[0],
        text_encoder_2=t5[1],
    )  # fmt: skip


def _enliven(transformer: nn.Module) -> None:
    """Unit gain in the linear layers and sharper attention: at the default initialisation references hardly matter."""
    with torch.no_grad():
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
            elif name.rsplit(".", 1)[-1] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                module.weight.mul_(2.5)


def _clip() -> tuple[Any, Any]:
    """A CLIP text encoder that reads single characters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH,
        num_attention_heads=4, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=77,
        projection_dim=TEXT_WIDTH,
    )  # fmt: skip
    return tokenizer, CLIPTextModel(config)


def _t5(length: int) -> tuple[Any, Any]:
    """A T5 encoder that reads single characters, `length` at most."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(chr(code), -3.0) for code in range(33, 127)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=16, d_ff=2 * TEXT_WIDTH, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8,
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config)
