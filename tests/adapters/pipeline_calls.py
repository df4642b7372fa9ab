"""The table of all arguments of the supported pipelines' calls: another value, and what of the model's call it changes.

`test_arguments` fails for an argument that a pipeline takes and the table lacks, for one that changes something else
than the table says, and for one that is not honoured where rows are dropped, stored, batched or trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.adapters.attention_masks import padding, rows_of, text_of
from tests.pictures import generator, mask, picture
from tests.pipeline_arguments import Request
from tests.pipelines import CASES, Case
from tests.training.batches import lora

HIDDEN, TEXT, TIME = "hidden_states", "encoder_hidden_states", "timestep"
IP = "joint_attention_kwargs"
"""Through which IP-Adapters get their tokens too."""
CALLS = "calls"
"""Stands among the changes where the number of calls of the transformer is another."""


PIPELINES = {name: case for name, case in CASES.items() if name not in ("qwen_edit_plus_2511",)}

Make = Callable[[Case, Any], dict[str, Any]]


@dataclass(frozen=True)
class Argument:
    """One argument of pipelines' calls.

    Attributes
    ----------
    make : callable
        From the case and its pipeline to the argument with a value that is not the default, and what it needs.
    changes : set of str
        What the pipelines give otherwise in the first call of the transformer that is another, or `CALLS`.
    inert : tuple of str
        Cases (beginnings of their names) whose calls stay as they are.
    prepare : callable, optional
        What is done to a new pipeline first.
    fails : tuple of str
        Cases in which diffusers' own pipeline cannot be given the argument.
    refused : str
        Why it cannot run in `sra.batch`, matched in the error.
    """

    make: Make
    changes: frozenset[str]
    inert: tuple[str, ...] = ()
    prepare: Callable[[Any], None] | None = None
    fails: tuple[str, ...] = ()
    refused: str = ""


def base_arguments(case: Case, pipe: Any, first: int = 0) -> dict[str, Any]:
    """What a plain call with one reference is given, seed and picture `first`."""
    request = Request(1, 1, case.side, False, case.sizes, False, first)
    common = {"prompt": "a cat", "num_inference_steps": 2, "height": case.side, "width": case.side, "output_type": "np"}
    known = inspect.signature(type(pipe).__call__).parameters
    common = {name: value for name, value in common.items() if name in known}
    return common | {"generator": generator(first)} | case.arguments(pipe, request)


def ip_adapter(pipe: Any) -> None:
    """Give a Kontext pipeline a random IP-Adapter of four image tokens, and an encoder for its pictures."""
    model, sizes = pipe.transformer, {"image_size": 32, "patch_size": 16, "projection_dim": 16, "hidden_size": 16}
    more = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipe.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.set_attn_processor({
            name: FluxIPAdapterAttnProcessor(model.inner_dim, 32, (4,), 1.0) if name.startswith("tran") else own
            for name, own in model.attn_processors.items()
        })  # fmt: skip
        model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(16, 32, 4)]).eval()
        pipe.image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **more)).eval()
    model.requires_grad_(False)


def _embeddings(case: Case, pipe: Any, prompt: str) -> dict[str, Any]:
    """`prompt` encoded, under the pipeline's own names."""
    if case.name.startswith("kontext"):
        embeds, pooled, _ = pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=32)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if case.name.startswith("qwen"):
        seen = [picture(64, 64)] if "plus" in case.name else picture(64, 64)
        embeds, keep = pipe.encode_prompt(prompt=prompt, image=seen, device=pipe.device)
        keep = torch.ones(embeds.shape[:2], dtype=torch.long) if keep is None else keep
        return {"prompt_embeds": embeds, "prompt_embeds_mask": keep}
    if case.name == "longcat":
        return {"prompt_embeds": pipe.encode_prompt([prompt], picture(32, 32))[0]}
    more = {"max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)}
    return {"prompt_embeds": pipe.encode_prompt(prompt=prompt, **more)[0]}


def _negative(case: Case, pipe: Any) -> dict[str, Any]:
    """Guidance by a negative prompt, given as embeddings."""
    guidance = {"true_cfg_scale": 2.0} if case.name.startswith(("kontext", "qwen")) else {"guidance_scale": 3.0}
    embeddings = {f"negative_{name}": value for name, value in _embeddings(case, pipe, "dark").items()}
    return guidance | embeddings | ({} if case.name == "longcat" else _prompt_embeds(case, pipe))


def _prompt_embeds(case: Case, pipe: Any) -> dict[str, Any]:
    return {"prompt": None} | _embeddings(case, pipe, "a long red kite")


def _padded(case: Case, pipe: Any) -> dict[str, Any]:
    """Embeddings with masked rows in the middle."""
    given = _prompt_embeds(case, pipe)
    given["prompt_embeds_mask"] = given["prompt_embeds_mask"].clone()
    given["prompt_embeds_mask"][:, 3:6] = 0
    return given


def _negative_padded(case: Case, pipe: Any) -> dict[str, Any]:
    given = _negative(case, pipe)
    given["negative_prompt_embeds_mask"] = given["negative_prompt_embeds_mask"].clone()
    given["negative_prompt_embeds_mask"][:, 1:3] = 0
    return given


def _attention(name: str) -> Make:
    def make(case: Case, pipe: Any) -> dict[str, Any]:
        if case.name.startswith("qwen"):
            return {name: {"scale": 0.5}}
        return {name: {"attention_mask": padding(1, text_of(case), rows_of(case.name)), "scale": 0.5}}

    return make


def _latents(case: Case, pipe: Any) -> dict[str, Any]:
    """Noise as each pipeline packs it."""
    side = 8
    if case.name.startswith(("kontext", "qwen")):
        return {"latents": torch.randn(1, side * side, 16, generator=generator(9))}
    if case.name == "longcat":
        return {"latents": torch.randn(1, side * side, 64, generator=generator(9))}
    return {"latents": torch.randn(1, 16, side, side, generator=generator(9))}


def _halved(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {name: value * 0.5 for name, value in given.items()}


def _guided(case: Case, pipe: Any) -> dict[str, Any]:
    return {"negative_prompt": "dark", "guidance_scale" if case.name == "longcat" else "true_cfg_scale": 3.0}


def _image_embeds(scale: float) -> list[torch.Tensor]:
    return [torch.randn(1, 1, 16, generator=generator(1)) * scale]


def _ip(name: str) -> Make:
    """A picture or its embedding for the IP-Adapter, and one for the negative prompt."""

    def make(case: Case, pipe: Any) -> dict[str, Any]:
        value = _image_embeds(1) if name.endswith("embeds") else picture(32, 32, 8)
        negative = _image_embeds(-1) if name.endswith("embeds") else picture(32, 32, 9)
        return {name: value, f"negative_{name}": negative}

    return make


def _ip_guided(name: str) -> Make:
    return lambda case, pipe: _guided(case, pipe) | _ip(name)(case, pipe)


def _set(**given: Any) -> Make:
    return lambda case, pipe: given


def _no_embeds(case: Case) -> dict[str, Any]:
    return {"prompt_embeds": None, "prompt_embeds_mask": None} if case.name.startswith("qwen") else {}


def _half(side: int) -> Any:
    """A mask of the left half."""
    white = mask(side, side).copy()
    white.paste(0, (0, 0, side, side))
    white.paste(255, (0, 0, side // 2, side))
    return white


def _masked_latents(case: Case, pipe: Any) -> dict[str, Any]:
    return {"masked_image_latents": torch.randn(1, 4, 1, 16, 16, generator=generator(4))}


def _scaled_lora(pipe: Any) -> None:
    """A LoRA, whose scale is among the attention's arguments; LongCat's pipeline hands none on."""
    if type(pipe).__name__ != "LongCatImageEditPipeline":
        lora(pipe.transformer).requires_grad_(False)


def _captions(pipe: Any) -> None:
    """The tiny text encoder writes no captions: a caption in the place of what it would write."""
    pipe.upsample_prompt = lambda prompt, **settings: ["a caption of the picture"]


def is_(*changes: str) -> frozenset[str]:
    return frozenset(changes)


NOTHING: frozenset[str] = frozenset()
WORDS = is_(TEXT, "pooled_projections")
PICTURE = is_(HIDDEN, TEXT, "img_ids", "img_shapes", "num_ref_tokens")
SIZE = is_(HIDDEN, TIME, "img_ids", "img_shapes")
EVERYTHING = is_(HIDDEN, TEXT, TIME, "img_ids", "txt_ids", "guidance", "pooled_projections")
FIXED = ("kontext_inpaint", "klein_inpaint", "qwen_edit_inpaint")
"""Pipelines whose output has the inpainted picture's size."""
NO_IP = "must go through FluxAttnProcessor, got"
ARGUMENTS: dict[str, Argument] = {
    # What is in the text.
    "prompt": Argument(lambda case, pipe: {"prompt": "a long red kite", **_no_embeds(case)}, WORDS),
    "prompt_2": Argument(lambda case, pipe: {"prompt_2": "a long red kite"}, is_(TEXT)),
    "negative_prompt": Argument(_guided, is_(CALLS)),
    "negative_prompt_2": Argument(lambda case, pipe: _guided(case, pipe) | {"negative_prompt_2": "grey"}, is_(CALLS)),
    "prompt_embeds": Argument(_prompt_embeds, WORDS, fails=("longcat",)),  # counts its missing prompts
    "pooled_prompt_embeds": Argument(_prompt_embeds, WORDS),
    "prompt_embeds_mask": Argument(_padded, is_(TEXT, f"{TEXT}_mask")),
    "negative_prompt_embeds": Argument(_negative, is_(CALLS)),
    "negative_pooled_prompt_embeds": Argument(_negative, is_(CALLS)),
    "negative_prompt_embeds_mask": Argument(_negative_padded, is_(CALLS)),
    "max_sequence_length": Argument(_set(max_sequence_length=40), is_(TEXT, "txt_ids"), ("qwen",)),
    "text_encoder_out_layers": Argument(_set(text_encoder_out_layers=(0, 1, 2)), is_(TEXT)),
    "caption_upsample_temperature": Argument(_set(caption_upsample_temperature=0.5), is_(TEXT), prepare=_captions),
    # What is in the pictures.
    "image": Argument(lambda case, pipe: {"image": picture(case.side, case.side, 7)}, PICTURE),
    "image_reference": Argument(lambda case, pipe: {"image_reference": picture(*case.sizes[0], 7)}, PICTURE),
    "mask_image": Argument(lambda case, pipe: {"mask_image": _half(case.side)}, is_(HIDDEN)),
    "masked_image_latents": Argument(_masked_latents, NOTHING, ("",)),
    "strength": Argument(_set(strength=0.4), is_(CALLS)),
    "padding_mask_crop": Argument(_set(padding_mask_crop=4, mask_image=_half(64), output_type="pil"), is_(HIDDEN)),
    "latents": Argument(_latents, is_(HIDDEN), fails=("qwen_edit_inpaint",)),
    "height": Argument(lambda case, pipe: {"height": 2 * case.side, "max_area": 2 * case.side**2}, SIZE, FIXED),
    "width": Argument(lambda case, pipe: {"width": 2 * case.side, "max_area": 2 * case.side**2}, SIZE, FIXED),
    "max_area": Argument(lambda case, pipe: {"max_area": 4 * case.side**2}, SIZE, FIXED),
    "_auto_resize": Argument(_set(_auto_resize=False), NOTHING, ("",)),
    "num_images_per_prompt": Argument(_set(num_images_per_prompt=2), EVERYTHING),
    "generator": Argument(lambda case, pipe: {"generator": generator(77)}, is_(HIDDEN)),
    # What steers the steps.
    "num_inference_steps": Argument(_set(num_inference_steps=3), is_(CALLS)),
    "sigmas": Argument(_set(sigmas=[0.9, 0.4]), is_(TIME, HIDDEN)),
    "guidance_scale": Argument(_set(guidance_scale=5.0), is_("guidance", CALLS), ("qwen",)),
    "true_cfg_scale": Argument(_guided, is_(CALLS)),
    "callback_on_step_end": Argument(_set(callback_on_step_end=_halved), is_(HIDDEN)),
    "callback_on_step_end_tensor_inputs": Argument(
        _set(callback_on_step_end=_halved, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]),
        is_(HIDDEN, TEXT),
    ),
    # What attention is told.
    "attention_kwargs": Argument(
        _attention("attention_kwargs"), is_("joint_attention_kwargs", "attention_kwargs"), prepare=_scaled_lora
    ),
    "joint_attention_kwargs": Argument(_attention("joint_attention_kwargs"), is_(IP), ("longcat",), _scaled_lora),
    "ip_adapter_image": Argument(_ip("ip_adapter_image"), is_(IP), (), ip_adapter, (), NO_IP),
    "ip_adapter_image_embeds": Argument(_ip("ip_adapter_image_embeds"), is_(IP), (), ip_adapter, (), NO_IP),
    "negative_ip_adapter_image": Argument(_ip_guided("ip_adapter_image"), is_(CALLS), (), ip_adapter, (), NO_IP),
    "negative_ip_adapter_image_embeds": Argument(
        _ip_guided("ip_adapter_image_embeds"), is_(CALLS), (), ip_adapter, (), NO_IP
    ),
    # What is returned.
    "output_type": Argument(_set(output_type="latent"), NOTHING, ("",)),
    "return_dict": Argument(_set(return_dict=False), NOTHING, ("",)),
}
