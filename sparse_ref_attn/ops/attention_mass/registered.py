"""Registration with torch: the mass of all queries, of a ragged batch, and of each query tile.

The ops are opaque to the compiler; the backend's name travels as an argument and is resolved inside, where pointers and
the device are known. Nothing is differentiable: a ranking needs no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import LayoutError
from ..shared.namespace import NAMESPACE
from .backends import choose
from .compute import PLAIN, compute, compute_tiles, lse_then_mass
from .offsets import check_offsets, check_tiles, split_offsets
from .ragged import Ragged

__all__ = ["mass_op", "mass_tiles_op", "mass_varlen_op"]

library: torch.library.Library = torch.library.Library(NAMESPACE, "FRAGMENT")
library.define(
    "attention_mass(Tensor q, Tensor k, SymInt start, SymInt stop, float scale, Tensor? key_mask, Tensor? lse, "
    "SymInt query_stride, str backend) -> Tensor"
)
library.define(
    "attention_mass_varlen(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor cu_seqlens_ref, "
    "Tensor ref_starts, SymInt total_ref, SymInt max_seqlen_q, SymInt max_seqlen_ref, float scale, Tensor? lse, "
    "SymInt query_stride, str backend, bool check=False, SymInt[]? host=None) -> Tensor"
)
library.define(
    "attention_mass_tiles(Tensor q, Tensor k, SymInt start, SymInt stop, float scale, Tensor? key_mask, Tensor? lse, "
    "Tensor tiles, SymInt[]? host, bool reduce_heads, str backend) -> Tensor"
)


def _mass(
    q: Tensor,
    k: Tensor,
    start: int,
    stop: int,
    scale: float,
    key_mask: Tensor | None,
    lse: Tensor | None,
    query_stride: int,
    backend: str,
) -> Tensor:
    chosen = choose(backend, q, k, scale, stop - start, lse is not None)
    return compute(q, k, start, stop, scale, key_mask, lse, query_stride, chosen)


def _mass_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_ref: Tensor,
    ref_starts: Tensor,
    total_ref: int,
    max_seqlen_q: int,
    max_seqlen_ref: int,
    scale: float,
    lse: Tensor | None,
    query_stride: int,
    backend: str,
    check: bool = False,
    host: list[int] | None = None,
) -> Tensor:
    items = max(ref_starts.shape[0], 1)  # the kind of call goes by the mean item
    one = (q[None, : -(-q.shape[0] // items)], k[None, : -(-k.shape[0] // items)])
    chosen = choose(backend, *one, scale, -(-total_ref // items), lse is not None)
    given = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_ref, ref_starts)
    if check or host is not None or chosen in PLAIN or not q.is_cuda:
        at_q, at_k, at_ref, starts = (x.tolist() for x in given) if host is None else split_offsets(host)
        if check and host is not None and [x.tolist() for x in given] != [at_q, at_k, at_ref, starts]:
            raise LayoutError(f"host must say what the offsets hold, {[x.tolist() for x in given]}, got {host}")
        check_offsets(
            {
                "cu_seqlens_q": (at_q, q.shape[0]),
                "cu_seqlens_k": (at_k, k.shape[0]),
                "cu_seqlens_ref": (at_ref, total_ref),
            },
            starts,
            {
                "max_seqlen_q": (max_seqlen_q, "cu_seqlens_q"),
                "max_seqlen_ref": (max_seqlen_ref, "cu_seqlens_ref"),
            },
        )
    if chosen not in PLAIN:
        ragged = Ragged(cu_seqlens_q, cu_seqlens_k, cu_seqlens_ref, ref_starts, max_seqlen_q, max_seqlen_ref)
        lse, span = None if lse is None else lse[None], (0, k.shape[0])
        q, k = q[None], k[None]
        return lse_then_mass(chosen, q, k, span, scale, None, lse, query_stride, ragged=(ragged, total_ref))[0]
    mass = q.new_zeros(q.shape[1], total_ref, dtype=torch.float32)
    for item, first in enumerate(starts):
        queries, keys = slice(*at_q[item : item + 2]), slice(*at_k[item : item + 2])
        out = slice(*at_ref[item : item + 2])
        if queries.start == queries.stop or out.start == out.stop:
            continue
        start = first - keys.start
        mass[:, out] = compute(
            q[None, queries],
            k[None, keys],
            start,
            start + out.stop - out.start,
            scale,
            None,
            None if lse is None else lse[None, :, queries],
            query_stride,
            chosen,
        )[0]
    return mass


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


library.impl("attention_mass", _mass, "CompositeExplicitAutograd")
library.impl("attention_mass_varlen", _mass_varlen, "CompositeExplicitAutograd")
library.impl("attention_mass_tiles", _mass_tiles, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::attention_mass", lib=library)
def _(
    q: Tensor,
    k: Tensor,
    start: int,
    stop: int,
    scale: float,
    key_mask: Tensor | None,
    lse: Tensor | None,
    query_stride: int,
    backend: str,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], stop - start), dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::attention_mass_varlen", lib=library)
def _(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, cu_ref: Tensor, ref_starts: Tensor, total_ref: int, *rest: object
) -> Tensor:
    return q.new_empty((q.shape[1], total_ref), dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::attention_mass_tiles", lib=library)
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


mass_op = getattr(torch.ops, NAMESPACE).attention_mass.default
mass_varlen_op = getattr(torch.ops, NAMESPACE).attention_mass_varlen.default
mass_tiles_op = getattr(torch.ops, NAMESPACE).attention_mass_tiles.default
