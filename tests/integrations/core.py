"""A real ComfyUI, where the environment variable SRA_COMFYUI says where one lies, and tiny random models of it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

VARIABLE = "SRA_COMFYUI"
needs_core = pytest.mark.skipif(
    VARIABLE not in os.environ, reason=f"no ComfyUI: {VARIABLE} must name a checkout whose requirements are installed"
)
TEXT, CONTEXT, POOLED = 7, 32, 24
_FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": CONTEXT, "hidden_size": 64,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, "axes_dim": [8, 12, 12], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "image_model": "flux",
    "txt_ids_dims": [],
}  # fmt: skip
_FLUX2 = _FLUX | {
    "in_channels": 128, "out_channels": 128, "axes_dim": [8, 8, 8, 8], "patch_size": 1, "qkv_bias": False,
    "vec_in_dim": None, "image_model": "flux2", "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
    "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3],
}  # fmt: skip
_QWEN = {
    "in_channels": 64, "out_channels": 16, "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": CONTEXT, "axes_dims_rope": (8, 12, 12), "image_model": "qwen_image",
}  # fmt: skip
MODELS = {"kontext": ("Flux", _FLUX), "flux2": ("Flux2", _FLUX2), "qwen": ("QwenImage", _QWEN)}


@cache
def core() -> Any:
    """The modules of ComfyUI that a sampling needs, on the CPU."""
    for path in os.environ[VARIABLE].split(os.pathsep):
        sys.path.append(path)
    from comfy.cli_args import args

    args.cpu = True
    for part in ("conds", "model_patcher", "patcher_extension", "sample", "samplers", "supported_models"):
        importlib.import_module(f"comfy.{part}")
    return sys.modules["comfy"]


def patcher(name: str, seed: int = 0) -> Any:
    """A ``ModelPatcher`` of a tiny model with random weights in float32; skips where ComfyUI is too old for it."""
    comfy = core()
    kind, config = MODELS[name]
    if not hasattr(comfy.supported_models, kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    settings = getattr(comfy.supported_models, kind)(_known(config))
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1))
    return comfy.model_patcher.ModelPatcher(
        model.eval(), load_device=torch.device("cpu"), offload_device=torch.device("cpu")
    )


def _known(config: dict[str, Any]) -> dict[str, Any]:
    """Without what this ComfyUI's FLUX has no name for yet."""
    if not config["image_model"].startswith("flux"):
        return dict(config)
    from comfy.ldm.flux.model import FluxParams

    names = {field.name for field in fields(FluxParams)} | {"image_model"}
    return {name: value for name, value in config.items() if name in names}


def latent(name: str, height: int, width: int, seed: int) -> Tensor:
    """In cells of the model's VAE."""
    frames = () if name != "qwen" else (1,)
    channels = 128 if name == "flux2" else 16
    return torch.randn(1, channels, *frames, height, width, generator=torch.Generator().manual_seed(seed))


def condition(seed: int, references: Sequence[Tensor] = (), **more: Any) -> list[Any]:
    """A conditioning with reference latents, as ComfyUI's nodes hand it on."""
    generator = torch.Generator().manual_seed(seed)
    options = {"pooled_output": torch.randn(1, POOLED, generator=generator), **more}
    if references:
        options["reference_latents"] = list(references)
    return [[torch.randn(1, TEXT, CONTEXT, generator=generator), options]]


@torch.inference_mode()
def sample(
    model: Any, name: str, positive: Any, negative: Any = None, *, steps: int = 4, cfg: float = 1.0,
    sampler: str = "euler", size: tuple[int, int] = (8, 8),
) -> Tensor:  # fmt: skip
    """What ``KSampler`` makes."""
    noise = latent(name, *size, seed=9)
    return core().sample.sample(
        model, noise, steps, cfg, sampler, "simple", positive, condition(5) if negative is None else negative,
        torch.zeros_like(noise), disable_pbar=True, seed=1,
    )  # fmt: skip
