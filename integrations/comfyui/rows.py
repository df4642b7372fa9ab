"""Where the tokens of one call of a ComfyUI model lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_ref_attn import PlainAdapter, Reference
from sparse_ref_attn.errors import UnsupportedModelError

__all__ = ["adapter_of", "conditional_of", "cut_mask", "kinds_of", "pack", "rows_of"]

MODELS = {
    "ldm.flux.model.Flux": (("double_blocks", "double"), ("single_blocks", "single")),
    "ldm.qwen_image.model.QwenImageTransformer2DModel": (("transformer_blocks", "double"),),
}
"""By the end of the class's full name: its lists of blocks in order of execution, and what their attention sees."""


def kinds_of(model: Any) -> list[str]:
    """The kind of each block's attention, in order of execution.

    Raises
    ------
    UnsupportedModelError
        If the model is none of `MODELS`.
    """
    for cls in type(model).__mro__:
        for name, stacks in MODELS.items():
            if f"{cls.__module__}.{cls.__qualname__}".endswith(name):
                return [kind for stack, kind in stacks for _ in getattr(model, stack)]
    raise UnsupportedModelError(
        "the model must be of the FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit family, got " + type(model).__name__
    )


def rows_of(latent: Tensor, patch: int) -> tuple[int, tuple[int, int] | None]:
    """Rows that a latent (B, C, H, W) or (B, C, T, H, W) makes, and their grid; None for several frames."""
    frames = latent.shape[2] if latent.ndim == 5 else 1
    height, width = (-(-side // patch) for side in latent.shape[-2:])
    return frames * height * width, (height, width) if frames == 1 else None


def pack(latent: Tensor, patch: int) -> Tensor:
    """The rows (B, rows, C * patch * patch) of a latent, each one patch, padded as ComfyUI does."""
    latent = latent if latent.ndim == 5 else latent[:, :, None]
    (frames, height, width), flat = latent.shape[2:], latent.flatten(1, 2)
    flat = torch.nn.functional.pad(flat, (0, -width % patch, 0, -height % patch), mode="circular")
    cells = flat.unflatten(1, (-1, frames)).unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
    return cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)  # (B, C, T, h, p, w, p) -> (B, T h w, C p p)


def conditional_of(marks: Sequence[int], batch: int) -> slice | None:
    """The batch items with the prompt, from the mark of each part: 0 with it, 1 without; None if they lie apart."""
    parts = [i for i, mark in enumerate(marks) if mark == 0]
    if not parts or parts != list(range(parts[0], parts[-1] + 1)):
        return None
    size = batch // len(marks)
    return slice(parts[0] * size, (parts[-1] + 1) * size)


def adapter_of(
    kinds: Sequence[str], generation: int, references: Sequence[tuple[int, Any]], conditional: slice | None
) -> PlainAdapter:
    """Of a call whose image stream is `generation` rows and then `references`, each (rows, grid)."""
    found, at = [], generation
    for length, grid in references:
        found.append(Reference(at, length, grid))
        at += length
    return PlainAdapter(
        tokens="img",
        rows={"img_ids": 1},
        text="txt",
        find=lambda kwargs: ((0, generation), tuple(found)),
        attention=kinds,
        conditional=None if conditional is None else lambda kwargs: conditional,
        name="ComfyUI",
    )


def cut_mask(mask: Any, text: int, rows: Tensor, length: int) -> Any:
    """A mask of joint attention with the text and `rows` of the image stream alone; anything else as it is."""
    if not isinstance(mask, Tensor) or mask.shape[-1] != length:
        return mask
    kept = torch.cat([torch.arange(text, device=mask.device), text + rows.to(mask.device)])
    for axis in range(max(mask.ndim - 2, 0), mask.ndim):
        if mask.shape[axis] == length:
            mask = mask.index_select(axis, kept)
    return mask
