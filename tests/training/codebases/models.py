"""Models with the call signatures of trainers, on tiny real diffusers transformers, under the trainers' own names.

Nothing of the trainers is here: each class or function takes the arguments that its namesake takes, and runs the layers
of a diffusers model on them. What the namesake does differently and the library must know of (entries by token, layers
run by a function) is written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation, Flux2TimestepGuidanceEmbeddings
from torch import Tensor, nn

from tests.pipelines import CASES

T = TypeVar("T", bound=Any)


def under(name: str) -> Callable[[T], T]:
    """A class or function under the full name of its namesake."""

    def rename(thing: T) -> T:
        thing.__module__, _, thing.__qualname__ = name.rpartition(".")
        return thing

    return rename


def transformer(case: str, **sizes: int) -> nn.Module:
    """The tiny transformer of a case, every parameter of which is trained."""
    return CASES[case].build(**sizes).transformer.train().requires_grad_(True)


@under("musubi_tuner.flux.flux_models.Flux")
class MusubiFlux(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = transformer("kontext")

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
        guidance: Tensor | None = None, control_lengths: list[int] | None = None,
    ) -> Tensor:  # fmt: skip
        assert control_lengths is None or len(set(control_lengths)) == 1  # unequal ones trim the items' attention
        return FluxTransformer2DModel.forward(
            self.own, hidden_states=img, img_ids=img_ids[0], encoder_hidden_states=txt, txt_ids=txt_ids[0],
            timestep=timesteps, pooled_projections=y, guidance=guidance, return_dict=False,
        )[0]  # fmt: skip


class _BlackForestFlux2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = transformer("flux2")

    def forward(
        self, x: Tensor, x_ids: Tensor, timesteps: Tensor, ctx: Tensor, ctx_ids: Tensor, guidance: Tensor | None
    ) -> Tensor:
        return Flux2Transformer2DModel.forward(
            self.own, hidden_states=x, img_ids=x_ids, timestep=timesteps, encoder_hidden_states=ctx, txt_ids=ctx_ids,
            guidance=guidance, return_dict=False,
        )[0]  # fmt: skip


@under("musubi_tuner.flux_2.flux2_models.Flux2")
class MusubiFlux2(_BlackForestFlux2):
    """FLUX.2 as musubi-tuner calls it."""


@under("extensions_built_in.diffusion_models.flux2.src.model.Flux2")
class AiToolkitFlux2(_BlackForestFlux2):
    """FLUX.2 as ai-toolkit calls it."""


@under("musubi_tuner.qwen_image.qwen_image_model.QwenImageTransformer2DModel")
class MusubiQwen(QwenImageTransformer2DModel):
    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, encoder_hidden_states_mask: Any = None,
        timestep: Any = None, img_shapes: Any = None, txt_seq_lens: Any = None, guidance: Any = None,
        attention_kwargs: Any = None, additional_t_cond: Any = None,
    ) -> Tensor:  # fmt: skip
        """The shapes are of the whole batch, once."""
        assert len(img_shapes) == 1
        return super().forward(
            hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep,
            img_shapes * len(hidden_states), guidance, attention_kwargs, return_dict=False,
        )[0]  # fmt: skip


@under("diffsynth.models.flux2_dit.Flux2DiT")
class DiffSynthFlux2(Flux2Transformer2DModel):
    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, timestep: Any = None, img_ids: Any = None,
        txt_ids: Any = None, guidance: Any = None, joint_attention_kwargs: Any = None, kv_cache: Any = None,
        use_gradient_checkpointing: bool = False, use_gradient_checkpointing_offload: bool = False,
    ) -> Tensor:  # fmt: skip
        assert kv_cache is None
        if use_gradient_checkpointing:
            self.enable_gradient_checkpointing()
        return super().forward(
            hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, guidance, joint_attention_kwargs,
            return_dict=False,
        )[0]  # fmt: skip


# Entries by token: every image row has a time, and the text the mean of what is made of them.


class _TimesByToken(Flux2TimestepGuidanceEmbeddings):
    def forward(self, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        if timestep.ndim == 1:
            return super().forward(timestep, guidance)
        rows = timestep.shape[1]
        guidance = None if guidance is None else guidance.repeat_interleave(rows)
        return super().forward(timestep.flatten(), guidance).unflatten(0, timestep.shape)


class _TextModulation(Flux2Modulation):
    def forward(self, temb: Tensor) -> Tensor:
        return super().forward(temb.mean(1) if temb.ndim == 3 else temb)


class _JointModulation(Flux2Modulation):
    text = 0

    def forward(self, temb: Tensor) -> Tensor:
        if temb.ndim == 3:
            temb = torch.cat([temb.mean(1, keepdim=True).expand(-1, self.text, -1), temb], 1)
        return super().forward(temb)


class _NormByToken(AdaLayerNormContinuous):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if temb.ndim == 2:
            return super().forward(x, temb)
        scale, shift = self.linear(self.silu(temb)).chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


@under("simpletuner.helpers.models.flux2.transformer.Flux2Transformer2DModel")
class SimpleTunerFlux2(Flux2Transformer2DModel):
    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, timestep: Any = None, timestep_sign: Any = None,
        r_timestep: Any = None, img_ids: Any = None, txt_ids: Any = None, guidance: Any = None,
        joint_attention_kwargs: Any = None, return_dict: bool = True, force_keep_mask: Any = None,
        hidden_states_buffer: dict[str, Tensor] | None = None,
    ) -> Any:  # fmt: skip
        assert timestep.ndim == 1 or timestep.shape == hidden_states.shape[:2]
        assert force_keep_mask is None or force_keep_mask.shape == hidden_states.shape[:2]
        self.single_stream_modulation.text = encoder_hidden_states.shape[1]
        return super().forward(
            hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, guidance, joint_attention_kwargs,
            return_dict=return_dict,
        )  # fmt: skip


@under("simpletuner.helpers.models.flux.transformer.FluxTransformer2DModel")
class SimpleTunerFlux(SimpleTunerFlux2):
    """FLUX.1's call; its layers are those that know times by token."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, pooled_projections: Any = None,
        timestep: Any = None, img_ids: Any = None, txt_ids: Any = None, guidance: Any = None, timestep_sign: Any = None,
        r_timestep: Any = None, joint_attention_kwargs: Any = None, controlnet_block_samples: Any = None,
        controlnet_single_block_samples: Any = None, return_dict: bool = True, attention_mask: Any = None,
        controlnet_blocks_repeat: bool = False, force_keep_mask: Any = None, hidden_states_buffer: Any = None,
        grounding_kwargs: Any = None,
    ) -> Any:  # fmt: skip
        pooled = encoder_hidden_states + pooled_projections[:, None]
        return super().forward(
            hidden_states, pooled, timestep, timestep_sign, r_timestep, img_ids, txt_ids, guidance,
            joint_attention_kwargs, return_dict, force_keep_mask, hidden_states_buffer,
        )  # fmt: skip


def simpletuner_flux2(cls: type[SimpleTunerFlux2], case: str = "flux2") -> nn.Module:
    """A FLUX.2 whose modulations know times by token."""
    model = as_class(cls, transformer(case))
    model.time_guidance_embed.__class__ = _TimesByToken
    model.double_stream_modulation_txt.__class__ = _TextModulation
    model.single_stream_modulation.__class__ = _JointModulation
    model.norm_out.__class__ = _NormByToken
    return model


@under("simpletuner.helpers.models.qwen_image.transformer.QwenImageTransformer2DModel")
class SimpleTunerQwen(QwenImageTransformer2DModel):
    """Times of the noisy rows and of the references: by token, or two an item and an index that chooses."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, encoder_hidden_states_mask: Any = None,
        timestep: Any = None, timestep_sign: Any = None, r_timestep: Any = None, img_shapes: Any = None,
        txt_seq_lens: Any = None, guidance: Any = None, attention_kwargs: Any = None,
        controlnet_block_samples: Any = None, force_keep_mask: Any = None, return_dict: bool = True,
        hidden_states_buffer: Any = None, modulate_index: Tensor | None = None,
    ) -> Any:  # fmt: skip
        if timestep.ndim == 2:
            assert timestep.shape == hidden_states.shape[:2]
            modulate_index, timestep = (timestep == 0).long(), torch.cat([timestep[:, 0], 0 * timestep[:, 0]])
        assert modulate_index is not None
        assert modulate_index.shape == hidden_states.shape[:2]
        index = modulate_index

        def chosen(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "modulate_index": index}

        hooks = [block.register_forward_pre_hook(chosen, with_kwargs=True) for block in self.transformer_blocks]
        try:
            return super().forward(
                hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep.chunk(2)[0], img_shapes,
                guidance, attention_kwargs, return_dict=return_dict,
            )  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()


def as_class(cls: type[nn.Module], model: nn.Module) -> Any:
    """The model as one of a class that derives from its own."""
    assert issubclass(cls, type(model))
    model.__class__ = cls
    return model


# Functions that run the layers, as DiffSynth-Studio does.


def tokens_of(latents: Tensor) -> Tensor:
    """(B, C, 2 h, 2 w) -> (B, h w, 4 C)."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def latents_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `tokens_of`, for latents of `height` x `width`."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


@under("diffsynth.pipelines.flux_image.model_fn_flux_image")
def model_fn_flux_image(
    dit: Any, controlnet: Any = None, latents: Any = None, timestep: Any = None, prompt_emb: Any = None,
    pooled_prompt_emb: Any = None, guidance: Any = None, text_ids: Any = None, image_ids: Any = None,
    kontext_latents: Any = None, kontext_image_ids: Any = None, entity_prompt_emb: Any = None,
    use_gradient_checkpointing: bool = False, **kwargs: Any,
) -> Tensor:  # fmt: skip
    if use_gradient_checkpointing:
        dit.enable_gradient_checkpointing()
    tokens, noisy = tokens_of(latents), image_ids.shape[1]
    if kontext_latents is not None:
        image_ids = torch.cat([image_ids, kontext_image_ids], -2)
        tokens = torch.cat([tokens, kontext_latents], 1)
    out = FluxTransformer2DModel.forward(
        dit, hidden_states=tokens, timestep=timestep / 1000, guidance=guidance, pooled_projections=pooled_prompt_emb,
        encoder_hidden_states=prompt_emb, txt_ids=text_ids[0], img_ids=image_ids[0], return_dict=False,
    )[0]  # fmt: skip
    return latents_of(out[:, :noisy], *latents.shape[2:])


class _FlatRope(nn.Module):
    """Takes the shapes of one item as a flat list, as DiffSynth-Studio's does."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, video_fhw: list[tuple[int, int, int]], txt_seq_lens: list[int], device: Any) -> Any:
        return self.own([video_fhw], max_txt_seq_len=max(txt_seq_lens), device=device)


def diffsynth_qwen(case: str) -> nn.Module:
    dit = transformer(case)
    dit.pos_embed = _FlatRope(dit.pos_embed)
    return dit


@under("diffsynth.pipelines.qwen_image.model_fn_qwen_image")
def model_fn_qwen_image(
    dit: Any = None, latents: Any = None, timestep: Any = None, prompt_emb: Any = None, prompt_emb_mask: Any = None,
    height: Any = None, width: Any = None, edit_latents: Any = None, layer_input_latents: Any = None,
    layer_num: Any = None, context_latents: Any = None, entity_prompt_emb: Any = None,
    edit_rope_interpolation: bool = False, use_gradient_checkpointing: bool = False, zero_cond_t: bool = False,
    by_hand: Tensor | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`by_hand`, which the namesake has not, takes these rows of every tensor with a row for each token."""
    given = [] if edit_latents is None else edit_latents if isinstance(edit_latents, list) else [edit_latents]
    pictures = [latents, *given]
    shapes = [(1, x.shape[2] // 2, x.shape[3] // 2) for x in pictures]
    image, noisy = torch.cat([tokens_of(x) for x in pictures], 1), shapes[0][1] * shapes[0][2]
    index = torch.tensor([[int(i >= noisy) for i in range(image.shape[1])]]) if zero_cond_t else None
    rotary, words = dit.pos_embed(shapes, prompt_emb_mask.sum(1).tolist(), device=latents.device)
    if by_hand is not None:
        image, rotary = image[:, by_hand], rotary[by_hand]
        index = None if index is None else index[:, by_hand]
    times = timestep / 1000
    image, text = dit.img_in(image), dit.txt_in(dit.txt_norm(prompt_emb))
    temb = dit.time_text_embed(torch.cat([times, 0 * times]) if zero_cond_t else times, image)
    for block in dit.transformer_blocks:
        arguments = (image, text, None, temb, (rotary, words), None, index)
        if use_gradient_checkpointing:
            text, image = torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
        else:
            text, image = block(*arguments)
    out = dit.proj_out(dit.norm_out(image, temb.chunk(2)[0] if zero_cond_t else temb))[:, :noisy]
    return latents_of(out, *latents.shape[2:])
