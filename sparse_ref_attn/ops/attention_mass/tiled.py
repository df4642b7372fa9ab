"""The mass of each query tile: registration with torch, and what each backend is called with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..shared.launch_config import capability_of, config_for
from .backends import choose
from .impl.chunked import attention_mass_chunked
from .impl.tuning import LSE, TILE_MASS
from .offsets import check_tiles
from .reference import attention_mass_reference
from .registered import PLAIN, Launchers, library

__all__ = ["LAUNCHERS", "compute_tiles", "mass_tiles_op"]

library.define(
    "attention_mass_tiles(Tensor q, Tensor k, SymInt start, SymInt stop, float scale, Tensor? key_mask, Tensor? lse, "
    "Tensor tiles, SymInt[]? host, bool reduce_heads, str backend) -> Tensor"
)


def _mass_tiles(
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
    backend: str,
) -> Tensor:
    chosen = choose(backend, q, k, scale, stop - start, lse is not None, tiled=True)
    if host is None and (chosen in PLAIN or not q.is_cuda):
        host = tiles.tolist()
    if host is not None:
        check_tiles(host, q.shape[1])
    return compute_tiles(q, k, start, stop, scale, key_mask, lse, tiles, host, reduce_heads, chosen)


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
    """The op by the backend `chosen`, which can do the call; `host`, what `tiles` holds, is plain PyTorch's need."""
    if chosen == "reference":
        mass = attention_mass_reference(q, k, (start, stop), scale, key_mask, lse, host).float()
        return mass.mean(dim=1) if reduce_heads else mass
    if chosen == "chunked":
        return attention_mass_chunked(q, k, (start, stop), scale, key_mask, lse, host, reduce_heads)
    launch_lse, launch_mass = LAUNCHERS[chosen](q)
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    if lse is None:
        lse = launch_lse(q, k, scale, 1, key_mask=key_mask)
    mask = None if key_mask is None else key_mask[:, start:stop]
    return launch_mass(q, k[:, start:stop], lse, tiles, scale, reduce_heads, key_mask=mask)


library.impl("attention_mass_tiles", _mass_tiles, "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_ref_attn::attention_mass_tiles", lib=library)
def _(
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
    backend: str,
) -> Tensor:
    rows = (tiles.shape[0] - 1, stop - start)
    return q.new_empty((q.shape[0], *rows) if reduce_heads else (q.shape[0], q.shape[2], *rows), dtype=torch.float32)


mass_tiles_op = torch.ops.sparse_ref_attn.attention_mass_tiles.default


def _triton(q: Tensor) -> Launchers:
    from .impl.triton_mass import launch_lse
    from .impl.triton_tile_mass import launch_tile_mass

    row = (capability_of(q), q.shape[-1])
    return partial(launch_lse, config=config_for(LSE, *row)), partial(
        launch_tile_mass, config=config_for(TILE_MASS, *row)
    )


LAUNCHERS: dict[str, Callable[[Tensor], Launchers]] = {"triton": _triton}
"""The launchers of the LSE and of the mass per tile, for these queries."""
