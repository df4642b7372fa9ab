"""How the backends of attention_mass are compared and timed for a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..verdicts import Kind, size_class
from ..verdicts.judge import Compared
from .backends import PREDICATES
from .compute import compute, compute_tiles
from .reference import attention_mass_reference

__all__ = ["CANDIDATES", "against", "candidates", "kind_of", "sized", "small"]

# What "auto" may take, by device; the order decides a tie.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "cuda", "chunked"),
    "cpu": ("chunked", "reference"),
}
PER_TILE = ", per tile"
MOST_FLOPS = {"cuda": 4e12, "cpu": 5e8}  # of a timed run; a problem beyond that is cut in heads, then in queries


def kind_of(q: Tensor, k: Tensor, references: int, lse_given: bool, tiled: bool = False) -> Kind:
    """The kind of a call with q (B, N, H, C), k (B, S, H, C)."""
    form = ("LSE given" if lse_given else "LSE computed") + PER_TILE * tiled
    heads, channels = q.shape[2:]
    size = tuple(size_class(rows) for rows in (q.shape[1], k.shape[1], references))
    return Kind("attention_mass", form, q.device, q.dtype, heads, heads, channels, False, q.shape[0] > 1, size)


def candidates(kind: Kind) -> Sequence[str]:
    """Names of the backends, in the order that decides a tie."""
    return CANDIDATES.get(kind.device.type, CANDIDATES["cpu"])


def against(kind: Kind, backend: str) -> list[str]:
    """Why a backend cannot do an aligned call of this kind."""
    x = torch.empty(1, 16, 1, kind.channels, dtype=kind.dtype, device=kind.device)
    return PREDICATES[backend](x, x, kind.channels**-0.5, _is_tiled(kind))


def small(kind: Kind) -> Callable[[str], Iterator[Compared]]:
    """Two items of odd lengths beyond one tile, padded keys, every query and every third one, or ragged query tiles."""
    q, k = _problem(kind, 2 if kind.several else 1, 133, 201, 2)
    scale, span = kind.channels**-0.5, (67, 199)
    mask = (torch.arange(k.shape[1]) % 7 != 3).expand(k.shape[0], -1).contiguous().to(kind.device)

    tiles = [0, 16, 32, 32, 37, 101, 133]

    def run_tiles(backend: str) -> Iterator[Compared]:
        for kept in (None, mask):
            lse = _lse(q, k, scale, kept) if _has_lse(kind) else None
            for reduced in (True, False):
                actual = _compute_tiles(q, k, span, scale, kept, lse, tiles, reduced, backend)
                truth = attention_mass_reference(q.double(), k.double(), span, scale, kept, tiles=tiles)
                low = attention_mass_reference(q, k, span, scale, kept, tiles=tiles)
                truth, low = (x.mean(1) if reduced else x for x in (truth, low))
                words = "mass per tile" + ", mean over heads" * reduced + ", masked" * (kept is not None)
                yield words, actual, truth, low

    def run(backend: str) -> Iterator[Compared]:
        for stride in (1, 3):
            for kept in (None, mask):
                lse = _lse(q, k, scale, kept) if _has_lse(kind) else None
                actual = compute(q, k, *span, scale, kept, lse, stride, backend)
                some = q[:, ::stride]
                truth = attention_mass_reference(some.double(), k.double(), span, scale, kept)
                low = attention_mass_reference(some, k, span, scale, kept)
                words = "mass" + ", every 3rd query" * (stride == 3) + ", masked" * (kept is not None)
                yield words, actual, truth, low

    return run_tiles if _is_tiled(kind) else run


def sized(kind: Kind) -> Callable[[str], Callable[[], object]]:
    """One item of the class's size, cut in heads and then in queries where that is much work; tiles of 16 queries."""
    queries, keys, references = kind.size
    one_head = 2.0 * queries * max(keys, 1) * kind.channels
    most = MOST_FLOPS.get(kind.device.type, MOST_FLOPS["cpu"])
    heads = max(1, min(kind.heads, int(most / one_head)))
    queries = max(64, min(queries, int(queries * most / (one_head * heads))))
    q, k = _problem(kind, 1, queries, keys, heads)
    lse = q.new_zeros(1, heads, queries, dtype=torch.float32) if _has_lse(kind) else None
    span, scale = (keys - min(references, keys), keys), kind.channels**-0.5
    tiles = [*range(0, queries, 16), queries]

    def prepare(backend: str) -> Callable[[], object]:
        if _is_tiled(kind):
            return lambda: _compute_tiles(q, k, span, scale, None, lse, tiles, True, backend)
        return lambda: compute(q, k, *span, scale, None, lse, 1, backend)

    return prepare


def _is_tiled(kind: Kind) -> bool:
    return kind.form.endswith(PER_TILE)


def _has_lse(kind: Kind) -> bool:
    return kind.form.startswith("LSE given")


def _compute_tiles(
    q: Tensor,
    k: Tensor,
    span: tuple[int, int],
    scale: float,
    mask: Tensor | None,
    lse: Tensor | None,
    tiles: list[int],
    reduce_heads: bool,
    backend: str,
) -> Tensor:
    offsets = torch.tensor(tiles, dtype=torch.int32, device=q.device)
    return compute_tiles(q, k, *span, scale, mask, lse, offsets, tiles, reduce_heads, backend)


def _problem(kind: Kind, items: int, queries: int, keys: int, heads: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(items, rows, heads, kind.channels, generator=generator) for rows in (queries, keys))
    return q.to(kind.device, kind.dtype), k.to(kind.device, kind.dtype)


def _lse(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bnhc,bshc->bhns", q.double(), k.double()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return scores.logsumexp(-1).float()
