"""Tiny pipelines with calls of their own: modular ones, and those whose output is no picture of the usual size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.modular_pipelines.flux.modular_blocks_flux_kontext import FluxKontextAutoBlocks
from diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein import Flux2KleinAutoBlocks
from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoBlocks
from diffusers.modular_pipelines.qwenimage import encoders as qwen_encoders
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage_edit import QwenImageEditAutoBlocks
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage_edit_plus import QwenImageEditPlusAutoBlocks
from diffusers.pipelines.joyimage import image_processor as joyimage_pictures
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from tests import text_encoders, tiny_models
from tests.copies import copies
from tests.models import ltx2, zimage
from tests.pictures import generator, picture
from tests.pipelines import CASES

AREA = 64**2
_RESIZING = (qwen_encoders, pipeline_qwenimage_layered)


@contextmanager
def small_pictures() -> Iterator[None]:
    """Inside, no pipeline makes a million pixels of its reference."""
    published = {module: module.calculate_dimensions for module in _RESIZING}
    for module, dimensions in published.items():
        module.calculate_dimensions = lambda area, ratio, f=dimensions: f(min(area, AREA), ratio)
    bucket, joyimage_pictures.find_best_bucket = (
        joyimage_pictures.find_best_bucket,
        lambda height, width, base: (height, width),
    )
    try:
        yield
    finally:
        joyimage_pictures.find_best_bucket = bucket
        for module, dimensions in published.items():
            module.calculate_dimensions = dimensions


@dataclass(frozen=True)
class Other:
    """One pipeline.

    Attributes
    ----------
    build : callable
        To a new pipeline.
    arguments : callable
        From a seed to the references and what else its call needs, without steps and noise.
    generation : int
        Rows of the generation.
    references : tuple of (int, int)
        Grid of each reference in tokens.
    modular : bool
        Whether its call gives what it is asked for by ``output``.
    guided : dict
        What turns guidance on.
    text_behind : bool
        Whether attention has the text's rows behind the others.
    beside : tuple of int, optional
        Of a model whose text and sound have attention of their own: how many rows these have.
    output : str
        What its call's output has the pictures as.
    output_type : str
        "np" of a pipeline that gives no latents.
    generated : callable
        From what the transformer gives to the rows (B, rows, ...) or the picture of the generation.
    tiles : bool
        Whether tiles may read reference tokens of their own.
    seen : callable, optional
        From a call's arguments and the kept tokens (R,) to what its attentions over n keys see of these, by n, where
        the model's rows lie otherwise than the others'.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[[int], dict[str, Any]]
    generation: int = 64
    references: tuple[tuple[int, int], ...] = ((8, 8),)
    modular: bool = True
    guided: dict[str, Any] = field(default_factory=dict)
    text_behind: bool = False
    beside: tuple[int, ...] = ()
    output: str = "images"
    output_type: str = "latent"
    generated: Callable[[torch.Tensor, int], torch.Tensor] = lambda sample, rows: sample[:, :rows]
    tiles: bool = True
    seen: Callable[[dict[str, Any], torch.Tensor], dict[int, torch.Tensor]] | None = None

    def call(self, pipe: Any, steps: int = 3, seed: int = 3, **more: Any) -> np.ndarray:
        """Its latents, or pictures, one above another, of the references that `seed` draws."""
        given = {"num_inference_steps": steps, "generator": generator(0), "output_type": self.output_type}
        given |= {"output": "images"} if self.modular else {}
        with small_pictures(), torch.random.fork_rng():
            torch.manual_seed(seed)  # JoyImage-Edit draws from torch's own stream
            images = pipe(**given | self.arguments(seed) | more)
        images = images if self.modular else getattr(images, self.output)
        return np.concatenate([np.asarray(each) for each in images])


def modular(blocks: Any, source: Any) -> Any:
    """A modular pipeline with the components of a tiny one."""
    pipe = blocks.init_pipeline()
    own = {n: c for n, c in source.components.items() if n in pipe.component_names and c is not None}
    pipe.update_components(**own)
    return pipe


@copies
def flux3() -> Any:
    """Prompts are given as embeddings: its upsampler and its text encoder are left out."""
    torch.manual_seed(0)
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    source = CASES["klein"].build()
    source.register_modules(transformer=transformer)
    tiny_models.enliven(transformer, 0)
    transformer.eval().requires_grad_(False)
    blocks = Flux3AutoBlocks()
    for name in ("prompt_upsampler", "text_encoder"):
        blocks.sub_blocks.pop(name)
    pipe = modular(blocks, source)
    pipe.update_components(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.93))
    return pipe


@copies
def fibo() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=[4, 6, 6], text_encoder_dim=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=0, in_channels=12,
        out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, temperal_downsample=[False, True, True],
    )  # fmt: skip
    encoder = SmolLM3ForCausalLM(
        SmolLM3Config(
            vocab_size=128001, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            initializer_range=text_encoders.WIDE_INIT,
        )
    )  # fmt: skip
    pipe = diffusers.BriaFiboEditPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae, text_encoder=encoder, tokenizer=text_encoders.byte_tokenizer(),
    )  # fmt: skip
    return tiny_models.ready(pipe, 0)


@copies
def layered() -> Any:
    """Three layers (the picture, and two that it is taken apart into) in four channels, and the picture."""
    torch.manual_seed(0)
    channels = 8  # a picture of as many channels as latents would be taken for them
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=4 * channels, out_channels=channels, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6), use_additional_t_cond=True,
        use_layer3d_rope=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1], num_res_blocks=0, temperal_downsample=[False, True],
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels, input_channels=4,
    )  # fmt: skip
    tokenizer, processor, encoder = text_encoders.qwen_vl()
    pipe = diffusers.QwenImageLayeredPipeline(
        scheduler=tiny_models.scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, processor=processor,
        transformer=transformer,
    )  # fmt: skip
    return tiny_models.ready(pipe, 0)


def joyimage(transformer: type, pipeline: type) -> Callable[[], Any]:
    """JoyImage-Edit and Edit-Plus; the VAE makes one token of 8 x 8 pixels."""

    @copies
    def build() -> Any:
        torch.manual_seed(0)
        model = transformer(
            in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=3, rope_dim_list=[4, 6, 6]
        )
        vae = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=0, temperal_downsample=[False, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=4,
        )  # fmt: skip
        with torch.no_grad():  # JoyImage-Edit samples what it encodes: a trained VAE is as good as sure of it
            vae.quant_conv.weight[4:] = 0
            vae.quant_conv.bias[4:] = -30
        tokenizer, processor, encoder = text_encoders.qwen3_vl()
        pipe = pipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer,
            processor=processor, transformer=model,
        )  # fmt: skip
        return tiny_models.ready(pipe, 0)

    return build


def _embeddings(seed: int) -> dict[str, Any]:
    """FLUX.3's prompts, of two lengths."""
    names = {"prompt_embeds": 20, "negative_prompt_embeds": 12}
    return {name: torch.randn(1, rows, 24, generator=generator(seed + rows)) for name, rows in names.items()}


def _kontext(seed: int) -> dict[str, Any]:
    sizes = {"height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False, "max_sequence_length": 32}
    return {"prompt": "a cat", "image": picture(48, 32, seed), **sizes}


def _klein(seed: int) -> dict[str, Any]:
    text = {"prompt": "a cat", "max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)}
    return {"image": picture(64, 64, seed), "height": 64, "width": 64, **text}


def _qwen(seed: int) -> dict[str, Any]:
    return {"prompt": "a cat", "image": picture(64, 64, seed), "height": 64, "width": 64}


def _qwen_plus(seed: int) -> dict[str, Any]:
    return _qwen(seed) | {"image": [picture(64, 64, seed), picture(64, 64, seed + 1)]}


def _flux3(seed: int) -> dict[str, Any]:
    pictures = [picture(96, 64, seed), picture(64, 64, seed + 1)]
    return {"image": pictures, "height": 64, "width": 64, **_embeddings(1)}


def _fibo(seed: int) -> dict[str, Any]:
    pictures = [picture(192, 128, seed), picture(64, 96, seed + 1)]
    prompt = {"prompt": '{"edit_instruction": "a cat"}', "guidance_scale": 1.0}
    return {"image": pictures, "height": 128, "width": 128, **prompt}


def _layered(seed: int) -> dict[str, Any]:
    return {"image": picture(64, 64, seed).convert("RGBA"), "prompt": "a cat", "layers": 2}


def _joyimage(seed: int) -> dict[str, Any]:
    return {"image": picture(96, 64, seed), "prompt": "a cat", "height": 64, "width": 96, "guidance_scale": 1.0}


def _joyimage_plus(seed: int) -> dict[str, Any]:
    pictures = [picture(96, 64, seed), picture(64, 64, seed + 1)]
    return {"images": pictures, "prompt": "a cat", "height": 64, "width": 64, "guidance_scale": 1.0}


OTHERS = {
    each.name: each
    for each in (
        Other("modular kontext", lambda: modular(FluxKontextAutoBlocks(), CASES["kontext"].build()), _kontext,
              references=((8, 12),)),
        Other("modular klein", lambda: modular(Flux2KleinAutoBlocks(), CASES["klein"].build()), _klein),
        Other("modular qwen edit", lambda: modular(QwenImageEditAutoBlocks(), CASES["qwen_edit"].build()), _qwen,
              guided={"negative_prompt": "dark"}, output_type="np"),
        Other("modular qwen edit plus",
              lambda: modular(QwenImageEditPlusAutoBlocks(), CASES["qwen_edit_plus"].build()), _qwen_plus,
              references=((8, 8), (8, 8)), guided={"negative_prompt": "dark"}, output_type="np"),
        Other("flux3", flux3, _flux3, references=((8, 12), (8, 8))),
        Other("fibo", fibo, _fibo, references=((8, 12), (6, 4)), modular=False, guided={"guidance_scale": 3.0}),
        Other("qwen layered", layered, _layered, generation=192, modular=False, output_type="np",
              guided={"negative_prompt": "dark", "true_cfg_scale": 2.0}),
        Other("joyimage edit", joyimage(diffusers.JoyImageEditTransformer3DModel, diffusers.JoyImageEditPipeline),
              _joyimage, generation=96, references=((8, 12),), modular=False, text_behind=True,
              generated=lambda sample, rows: sample[:, -1], guided={"guidance_scale": 2.0, "negative_prompt": "dark"}),
        Other("joyimage edit plus",
              joyimage(diffusers.JoyImageEditPlusTransformer3DModel, diffusers.JoyImageEditPlusPipeline),
              _joyimage_plus, references=((8, 12), (8, 8)), modular=False, text_behind=True,
              guided={"guidance_scale": 2.0, "negative_prompt": "dark"}),
        Other("z-image omni", zimage.build, zimage.arguments, references=((8, 10), (9, 9)), modular=False,
              guided={"guidance_scale": 3.0, "negative_prompt": "dark and blurry " * 4}, tiles=False,
              generated=lambda sample, rows: torch.stack(sample) if isinstance(sample, list) else sample,
              seen=zimage.seen),
        Other("ltx2", ltx2.build, ltx2.arguments, generation=128, references=((8, 8), (4, 4), (4, 4)), modular=False,
              beside=(24, 9), output="frames", guided=ltx2.GUIDED),
    )
}  # fmt: skip
