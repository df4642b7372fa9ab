"""Synthetic references whose subject is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ref_attn.selection import References
from sparse_ref_attn.types import Reference, TokenLayout


def references(
    grids: Sequence[tuple[int, int]], *, batch: int = 1, width: int = 8, seed: int = 0, **given: object
) -> References:
    """References of these grids after 7 text and 5 generation tokens, with random tokens unless given."""
    parts, start = [], 5
    for height, columns in grids:
        parts.append(Reference(start, height * columns, (height, columns)))
        start += height * columns
    layout = TokenLayout(rows=start, text=7, generation=(0, 5), references=tuple(parts))
    generator = torch.Generator().manual_seed(seed)
    tokens = given.pop("tokens", None)
    if tokens is None:
        tokens = torch.randn(batch, layout.reference_tokens, width, generator=generator)
    return References(layout, tokens, generator=generator, **given)  # type: ignore[arg-type]


def disc(grid: tuple[int, int], patch: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A textured, coloured disc on a smooth ramp: pixels (1, 3, H, W) in [-1, 1], and the disc's pixels (H, W)."""
    height, width = grid[0] * patch, grid[1] * patch
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    radius = 0.25 * min(height, width)
    inside = (y - 0.45 * height) ** 2 + (x - 0.55 * width) ** 2 < radius**2
    texture = torch.rand(1, 1, grid[0] * 4, grid[1] * 4, generator=torch.Generator().manual_seed(seed))
    texture = torch.nn.functional.interpolate(texture, (height, width))
    ramp = 0.1 * (y / height - 0.5).expand(1, 3, -1, -1)
    subject = torch.cat([texture, 0.3 * texture, -texture], dim=1)
    return torch.where(inside, subject, ramp), inside


def recall(score: Tensor, subject: Tensor, share: float = 0.25) -> float:
    """Share of the subject's tokens among the best `share` of all."""
    kept = score.sort(descending=True, stable=True).indices[: round(share * len(score))]
    return float(subject[kept].sum() / subject.sum())
