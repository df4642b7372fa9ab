"""Parts of diffusers' models and pipelines that no public interface names.

FLUX.2's modulation by row, for items of different timesteps that lie end to end: blocks modulate by (batch, 1, D) and
as well by (batch, rows, D); the output norm only by batch, so there the rows stand in for the batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import IncompatibleError, LayoutError, VersionError
from ..instance import InstanceHook

__all__ = [
    "check_parts",
    "encoded_reference",
    "missing_parts",
    "offload_hook",
    "packed_reference",
    "per_row_modulation",
    "qwen_frequencies",
    "rotate_pairs",
    "rotate_qwen",
    "tensors_on_disk",
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


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """FLUX's rotary embedding of x (B, S, H, C) by tables (S, C)."""
    module = importlib.import_module("diffusers.models.embeddings")
    return module.apply_rotary_emb(x, (cos, sin), sequence_dim=1)


def rotate_qwen(x: Tensor, table: Tensor) -> Tensor:
    """Qwen-Image's rotary embedding of x (B, S, H, C) by a complex table (S, C / 2)."""
    module = importlib.import_module("diffusers.models.transformers.transformer_qwenimage")
    return module.apply_rotary_emb_qwen(x, table, use_real=False)


def per_row_modulation(transformer: Any, running: Callable[[], Any]) -> list[Callable[[], None]]:
    """Hooks, as removers, that repeat each item's modulation over its rows; `running()` is the joined call or None."""

    def lengths(*streams: str) -> list[int] | None:
        """Rows of the items in `streams`, one after another; None where all share one modulation."""
        call = running()
        if call is None or call.kwargs["timestep"].shape[0] == 1:
            return None
        return [rows for name in streams for rows in getattr(call, name)]

    def spread(values: Tensor, counts: list[int]) -> Tensor:
        times = torch.tensor(counts, device=values.device)
        values = values.repeat(len(counts) // values.shape[0], 1)
        return values.repeat_interleave(times, 0, output_size=sum(counts))

    def by_row(*streams: str) -> Callable[..., Any]:
        def call(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            counts = lengths(*streams)
            return None if counts is None else spread(output, counts)[None]

        return call

    def rows_as_batch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if lengths("images") is None else (args[0].transpose(0, 1), *args[1:])

    def norm_by_row(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        counts = lengths("images")
        return None if counts is None else spread(output, counts)

    def batch_as_rows(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if lengths("images") is None else output.transpose(0, 1)

    norm = transformer.norm_out
    after = [
        (transformer.double_stream_modulation_img, by_row("images")),
        (transformer.double_stream_modulation_txt, by_row("text")),
        (transformer.single_stream_modulation, by_row("text", "images")),
        (norm.linear, norm_by_row),
        (norm, batch_as_rows),
    ]
    hooks = [module.register_forward_hook(InstanceHook(module, call)).remove for module, call in after]
    return [norm.register_forward_pre_hook(InstanceHook(norm, rows_as_batch)).remove, *hooks]


def qwen_frequencies(pos_embed: Any, frame: int, shape: Sequence[int], positions: Tensor) -> Tensor:
    """Rotations (K, C/2) complex at fractional cells (y, x) of a grid centred as Qwen-Image centres it."""
    if shape[0] != 1:
        raise LayoutError(f"a reference must have one frame to be placed, got {tuple(shape)}")
    parts = [torch.full_like(positions[:, 0], frame)]
    for axis in (0, 1):
        size = shape[1 + axis]
        parts.append(positions[:, axis] - (size - size // 2 if pos_embed.scale_rope else 0))
    dims, theta = pos_embed.axes_dim, pos_embed.theta
    return torch.cat([pos_embed.rope_params(p.cpu(), d, theta) for p, d in zip(parts, dims, strict=True)], 1)


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
