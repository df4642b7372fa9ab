"""What users would do instead of dropping tokens: token merging, and a smaller reference, at equal tokens.

Both run through the same harness as the selectors: ``SparseRef(select=Downscale(), budget=0.25)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .checks import is_one_of
from .errors import ConfigError, LayoutError, PixelsUnavailableError
from .selection import Reduced, Reducer, References

__all__ = ["Downscale", "ToMe"]


@dataclass(frozen=True)
class ToMe(Reducer):
    """Merges each reference's most similar tokens until K are left (token merging, without unmerging).

    In rounds, as in [1]_: a destination in each cell of s x s tokens (as in [2]_, its first token; s is 2 in the
    first round), every other token a source; each source finds the destination of highest cosine similarity, and the
    most similar sources are merged into theirs, at most half of the tokens a round. A merged token is the mean of
    all tokens that went into it (the size-weighted mean of [1]_) and stands where its destination stands: a mean
    position may lie where no such content is (two corners of sky would meet in the middle), and the model knows
    whole positions. A token that nothing was merged into is unchanged, bit for bit.

    Notes
    -----
    Similarity is that of the transformer's input tokens (packed latents), since nothing else exists before the first
    block; the items of a batch are merged alike, by their mean similarity. References are context only, so there is
    no unmerging; the proportional attention of [1]_ would have to reach into every attention call and is left out.
    Deterministic; draws no random numbers; ties go to the lower index. One sync a round, at most log2(R / K) + 1
    rounds, once for every distinct K of a run. Needs (3/4 R) x (1/4 R) float32 for the similarities.

    References
    ----------
    .. [1] Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, section 3.
    .. [2] Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPRW 2023, arXiv 2303.17604, section 4.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=8, text=0, generation=(0, 4), references=(Reference(4, 4, (2, 2)),))
    >>> tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
    >>> (merged,) = ToMe().reduce(References(layout, tokens), (2,))
    >>> merged.tokens.tolist(), merged.positions.tolist()
    ([[[1.6666666269302368, 0.0], [0.0, 1.0]]], [[0.0, 0.0], [1.0, 0.0]])
    """

    def reduce(self, references: References, counts: tuple[int, ...]) -> list[Reduced]:
        """Exactly ``counts[i]`` tokens for reference i, at least 1."""
        parts = references.split(references.tokens)
        return [
            _merge(tokens, references.grid(i), min(max(1, count), tokens.shape[1]))
            for i, (tokens, count) in enumerate(zip(parts, counts, strict=True))
        ]


@dataclass(frozen=True)
class Downscale(Reducer):
    """A smaller reference: its picture shrunk until it has at most K tokens, spread over the original's extent.

    The new grid (h', w') is the one of at most K tokens whose coarser axis is as fine as possible, max min(h'/h,
    w'/w): as large as K allows at the reference's aspect. Its token (i, j) stands at ((i + 1/2) h/h' - 1/2,
    (j + 1/2) w/w' - 1/2) of the original grid, the centre of the cells it stands for.

    Parameters
    ----------
    source : {"pixels", "latents"}
        "pixels": the pixels that the pipeline encoded are resized (bicubic, antialiased) and encoded again by the
        pipeline's own VAE, as if the user had shrunk the photo. "latents": the reference's packed latents are
        averaged over areas of their grid; for bare transformers, and for latents given as images.

    Raises
    ------
    ConfigError
        For another source.

    Notes
    -----
    The encoding draws no random numbers and costs one small VAE call a reference, once for every distinct K of a run.
    h'w' is often a few tokens below K, so a rounding of the joint length (``SparseRef(multiple=...)``) is not kept.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=8, text=0, generation=(0, 4), references=(Reference(4, 4, (2, 2)),))
    >>> tokens = torch.tensor([[[1.0], [2.0], [3.0], [6.0]]])
    >>> (small,) = Downscale("latents").reduce(References(layout, tokens), (1,))
    >>> small.tokens.tolist(), small.positions.tolist()
    ([[[3.0]]], [[0.5, 0.5]])
    """

    source: str = "pixels"

    def __post_init__(self) -> None:
        if not is_one_of(self.source, ("pixels", "latents")):
            raise ConfigError(f'source must be "pixels" or "latents", got {self.source!r}')

    def reduce(self, references: References, counts: tuple[int, ...]) -> list[Reduced]:
        """At most ``counts[i]`` tokens for reference i, at least 1.

        Raises
        ------
        PixelsUnavailableError
            If `source` is "pixels" and a reference has none, or nothing can encode them.
        LayoutError
            If the VAE gives another grid or batch than asked for.
        """
        out = []
        for i, (tokens, count) in enumerate(zip(references.split(references.tokens), counts, strict=True)):
            grid = references.grid(i)
            small = _shrunk(grid, max(1, count))
            if small == grid:
                new = tokens
            elif self.source == "latents":
                new = _averaged(tokens, grid, small)
            else:
                new = _encoded(references, i, grid, small)
            out.append(Reduced(new, _positions(grid, small)))
        return out


def _merge(tokens: Tensor, grid: tuple[int, int], keep: int) -> Reduced:
    """Merge (B, R, D) down to `keep` tokens. The bookkeeping is on the CPU, the similarities on the tokens' device."""
    width = grid[1]
    place = torch.arange(tokens.shape[1])
    if keep == tokens.shape[1]:
        return Reduced(tokens, torch.stack([place // width, place % width], 1).float())
    total = tokens.detach().to("cpu", torch.float64, copy=True)
    size = torch.ones_like(place)
    while (number := place.shape[0]) > keep:
        target, source = _bipartition(place, grid)
        means = functional.normalize((total / size[:, None]).to(tokens.device, torch.float32), dim=-1)
        similarity = torch.einsum("bsd,btd->st", means[:, source], means[:, target]) / tokens.shape[0]
        best, match = (part.cpu() for part in similarity.max(dim=1))
        merged = min(number - keep, number // 2, len(source))
        chosen = best.sort(descending=True, stable=True).indices[:merged]
        into, gone = target[match[chosen]], source[chosen]
        total.index_add_(1, into, total[:, gone])
        size.index_add_(0, into, size[gone])
        left = torch.ones(number, dtype=torch.bool)
        left[gone] = False
        total, size, place = total[:, left], size[left], place[left]
    new = (total / size[:, None]).to(tokens.dtype).to(tokens.device)
    return Reduced(new, torch.stack([place // width, place % width], 1).float())


def _bipartition(place: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Destinations and sources among the tokens left at `place` (ascending), as indices into `place`.

    The destinations are the first token left in each cell; cells grow as tokens get fewer, to hold about four.
    """
    height, width = grid
    number = place.shape[0]
    side = max(2, round(2 * math.sqrt(height * width / number)))
    while True:
        cell = place // width // side * width + place % width // side
        ordered, at = cell.sort(stable=True)
        first = torch.ones(number, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        target = at[first].sort().values
        if len(target) < number:
            break
        side += 1  # every cell holds one token: wider cells
    source = torch.ones(number, dtype=torch.bool)
    source[target] = False
    return target, source.nonzero().flatten()


def _shrunk(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """The grid of at most `count` tokens that maximises min(h'/h, w'/w), then h'w'.

    >>> _shrunk((64, 64), 1024), _shrunk((64, 64), 410), _shrunk((4, 96), 2)
    ((32, 32), (20, 20), (1, 2))
    """
    height, width = grid
    candidates = [(h, min(width, count // h)) for h in range(1, min(height, count) + 1)]
    return max(candidates, key=lambda c: (min(c[0] * width, c[1] * height), c[0] * c[1]))


def _positions(grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """Centres of the cells of `small` in the cells of `grid`, (h'w', 2), on the CPU."""
    axes = [
        (torch.arange(new, dtype=torch.float64) + 0.5) * size / new - 0.5 for size, new in zip(grid, small, strict=True)
    ]
    return torch.cartesian_prod(*axes).float()


def _averaged(tokens: Tensor, grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """(B, R, D) packed latents averaged over areas of their grid."""
    cells = tokens.float().transpose(1, 2).unflatten(2, grid)
    return functional.interpolate(cells, small, mode="area").flatten(2).transpose(1, 2).to(tokens.dtype)


def _encoded(references: References, i: int, grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """Tokens (B, h'w', D) of reference `i`'s picture, resized to the grid `small`."""
    pixels = references.pixels[i] if i < len(references.pixels) else None
    if pixels is None or references.encode is None:
        what = "no pixels: they were given as latents" if references.encode else "no VAE: a bare transformer is patched"
        raise PixelsUnavailableError(
            'Downscale(source="pixels") needs the pixels that the pipeline encoded and its VAE, and reference '
            f'{i} has {what}. Patch the pipeline and pass images, or use Downscale(source="latents")'
        )
    size = [new * extent // old for new, extent, old in zip(small, pixels.shape[-2:], grid, strict=True)]
    resized = functional.interpolate(pixels.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
    tokens, got = references.encode(resized.to(pixels.dtype))
    items = references.tokens.shape[0]
    if tuple(got) != small or items % tokens.shape[0]:
        raise LayoutError(
            f"reference {i} encoded at {size[0]} x {size[1]} pixels must give a grid of {small} for {items} items, got "
            f"{tuple(got)} for {tokens.shape[0]}"
        )
    return tokens.repeat(items // tokens.shape[0], 1, 1)  # as the pipelines repeat them
