"""What each backend is called with, for q (B, N, H, C) and k (B, S, H, C): by the registered ops and by the trial."""

from __future__ import annotations

from torch import Tensor

from .backends import LAUNCHERS
from .impl.chunked import attention_mass_chunked
from .ragged import Ragged
from .reference import attention_mass_reference

__all__ = ["PLAIN", "compute", "compute_tiles", "lse_then_mass"]

PLAIN = ("reference", "chunked")


def compute(
    q: Tensor,
    k: Tensor,
    start: int,
    stop: int,
    scale: float,
    key_mask: Tensor | None,
    lse: Tensor | None,
    query_stride: int,
    chosen: str,
) -> Tensor:
    """The mean over all queries by the backend `chosen`, which can do the call."""
    if chosen not in PLAIN:
        return lse_then_mass(chosen, q, k, (start, stop), scale, key_mask, lse, query_stride)
    if query_stride > 1:
        q, lse = q[:, ::query_stride], None if lse is None else lse[..., ::query_stride]
    if chosen == "reference":
        return attention_mass_reference(q, k, (start, stop), scale, key_mask, lse).float()
    return attention_mass_chunked(q, k, (start, stop), scale, key_mask, lse)


def compute_tiles(
    q: Tensor,
    k: Tensor,
    start: int,
    stop: int,
    scale: float,
    key_mask: Tensor | None,
    lse: Tensor | None,
    tiles: Tensor,
    host: list[int] | None,
    reduce_heads: bool,
    chosen: str,
) -> Tensor:
    """The mean over each tile's queries; `host`, what `tiles` holds, is plain PyTorch's need."""
    if chosen not in PLAIN:
        return lse_then_mass(chosen, q, k, (start, stop), scale, key_mask, lse, 1, (tiles, reduce_heads))
    if chosen == "reference":
        mass = attention_mass_reference(q, k, (start, stop), scale, key_mask, lse, host).float()
        return mass.mean(dim=1) if reduce_heads else mass
    return attention_mass_chunked(q, k, (start, stop), scale, key_mask, lse, host, reduce_heads)


def lse_then_mass(
    chosen: str,
    q: Tensor,
    k: Tensor,
    span: tuple[int, int],
    scale: float,
    key_mask: Tensor | None,
    lse: Tensor | None,
    query_stride: int,
    tiles: tuple[Tensor, bool] | None = None,
    ragged: tuple[Ragged, int] | None = None,
) -> Tensor:
    """By the kernels of `chosen`: the LSE over all keys where it is not given, then the mass of the span.

    `tiles`: their offsets, and whether heads are reduced. `ragged`: where the items of packed rows (B = 1) lie, and
    how many references they have together.
    """
    launch = LAUNCHERS[chosen](q)
    key_mask = None if key_mask is None else key_mask.contiguous()
    if lse is None:
        rows = {"key_mask": key_mask} if ragged is None else {"ragged": ragged[0]}
        lse = launch.lse(q, k, scale, query_stride, **rows)
    if ragged is not None:
        return launch.mass(q, k, lse, scale, query_stride, ragged=ragged[0], total_ref=ragged[1])
    columns = slice(*span)
    k, key_mask = k[:, columns], None if key_mask is None else key_mask[:, columns]
    if tiles is None:
        return launch.mass(q, k, lse, scale, query_stride, key_mask=key_mask)
    assert launch.tile_mass is not None, f"{chosen} has no mass per tile, which its predicate must say"
    offsets, reduce_heads = tiles
    return launch.tile_mass(q, k, lse, offsets, scale, reduce_heads, key_mask=key_mask)
