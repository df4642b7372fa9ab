"""Parts of diffusers' models and pipelines that no public interface names, of every family alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import IncompatibleError, VersionError

__all__ = [
    "applied_loras",
    "check_parts",
    "encoded_reference",
    "missing_parts",
    "offload_hook",
    "packed_reference",
    "tensors_on_disk",
    "weights_folder",
]


def check_parts(transformer: nn.Module, parts: Sequence[str]) -> None:
    """Raise VersionError, naming them, where a transformer of diffusers lacks attributes that an adapter relies on.

    Parameters
    ----------
    transformer : nn.Module
    parts : sequence of str
        Dotted names, such as "norm_out.linear".
    """
    missing = missing_parts(transformer, parts)
    if missing:
        raise VersionError(
            f"{type(transformer).__name__} must have {', '.join(parts)}, as in the diffusers that this library was "
            f"written for; {', '.join(missing)} is gone"
        )


def missing_parts(transformer: nn.Module, parts: Sequence[str]) -> list[str]:
    """Those of the dotted names that a transformer has not."""
    return [part for part in parts if not _has(transformer, part)]


def _has(found: object, part: str) -> bool:
    for name in part.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def encoded_reference(pipe: Any, pixels: Tensor) -> Tensor:
    """Latents of an image (b, 3, [1,] H, W) as the pipeline makes them of a reference, without random numbers.

    Raises
    ------
    IncompatibleError
        If the pipeline has no method for it, as modular pipelines and those without references have none.
    """
    return _method(pipe, "_encode_vae_image")(image=pixels, generator=None)


def packed_reference(pipe: Any, latents: Tensor, *sizes: int) -> Tensor:
    """Latents as the transformer's tokens (b, R, D); raises as `encoded_reference`."""
    return _method(pipe, "_pack_latents")(latents, *sizes)


def _method(pipe: Any, name: str) -> Callable[..., Any]:
    method = getattr(pipe, name, None)
    if method is None:
        raise IncompatibleError(
            f"to encode images, a pipeline must have the method {name} of those that edit references, and "
            f"{type(pipe).__name__} has none: it cannot encode images. Use what works on latents, such as "
            'Downscale(source="latents")'
        )
    return method


def weights_folder(module: nn.Module) -> str | None:
    """The folder, or the name on the hub, that a model was loaded from; None where it was not."""
    config = getattr(module, "config", None)
    return getattr(config, "_name_or_path", None) or None


def applied_loras(module: nn.Module) -> dict[str, Any]:
    """peft's configuration of each LoRA that a model's layers apply now, by its name; empty without one."""
    configs: dict[str, Any] = getattr(module, "peft_config", None) or {}
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "lora_A")] if configs else []
    applied = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    return {name: config for name, config in configs.items() if name in applied}


def offload_hook(module: nn.Module | None) -> Any:
    """The hook by which accelerate offloads a module's weights, None without one."""
    return getattr(module, "_hf_hook", None)


def tensors_on_disk(module: nn.Module) -> dict[int, tuple[str, str]]:
    """Weights that group offloading keeps in files: (safetensors file, key) by the tensor's id.

    What the module then has in their place is memory that nobody filled.
    """
    found: dict[int, tuple[str, str]] = {}
    for each in module.modules():
        hook = getattr(getattr(each, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
        group = getattr(hook, "group", None)
        if group is not None and getattr(group, "_is_offloaded_to_disk", False):
            found |= {id(x): (group.safetensors_file_path, key) for x, key in group.tensor_to_key.items()}
    return found
