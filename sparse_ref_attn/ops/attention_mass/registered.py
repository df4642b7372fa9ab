"""Registration with torch, and what each backend is called with.

The ops are opaque to the compiler; the backend's name travels as an argument and is resolved inside, where pointers and
the device are known. Nothing is differentiable: a ranking needs no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...errors import LayoutError
from ..shared.launch_config import capability_of, config_for
from .backends import choose
from .impl.chunked import attention_mass_chunked
from .impl.tuning import LSE, MASS
from .offsets import check_offsets, split_offsets
from .ragged import Ragged
from .reference import attention_mass_reference

__all__ = ["LAUNCHERS", "Launchers", "compute", "mass_op", "mass_varlen_op"]

PLAIN = ("reference", "chunked")

library: torch.library.Library = torch.library.Library("sparse_ref_attn", "FRAGMENT")
library.define(
    "attention_mass(Tensor q, Tensor k, SymInt start, SymInt stop, float scale, Tensor? key_mask, Tensor? lse, "
    "SymInt query_stride, str backend) -> Tensor"
)
library.define(
    "attention_mass_varlen(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor cu_seqlens_ref, "
    "Tensor ref_starts, SymInt total_ref, SymInt max_seqlen_q, SymInt max_seqlen_ref, float scale, Tensor? lse, "
    "SymInt query_stride, str backend, bool check=False, SymInt[]? host=None) -> Tensor"
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
    """The op by the backend `chosen`, which can do the call."""
    if chosen not in PLAIN:
        launch_lse, launch_mass = LAUNCHERS[chosen](q)
        if key_mask is not None:
            key_mask = key_mask.contiguous()
        if lse is None:
            lse = launch_lse(q, k, scale, query_stride, key_mask=key_mask)
        mask = None if key_mask is None else key_mask[:, start:stop]
        return launch_mass(q, k[:, start:stop], lse, scale, query_stride, key_mask=mask)
    if query_stride > 1:
        q, lse = q[:, ::query_stride], None if lse is None else lse[..., ::query_stride]
    if chosen == "reference":
        return attention_mass_reference(q, k, (start, stop), scale, key_mask, lse).float()
    return attention_mass_chunked(q, k, (start, stop), scale, key_mask, lse)


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
        launch_lse, launch_mass = LAUNCHERS[chosen](q)
        ragged = Ragged(cu_seqlens_q, cu_seqlens_k, cu_seqlens_ref, ref_starts, max_seqlen_q, max_seqlen_ref)
        q, k, lse = q[None], k[None], None if lse is None else lse[None]
        if lse is None:
            lse = launch_lse(q, k, scale, query_stride, ragged=ragged)
        return launch_mass(q, k, lse, scale, query_stride, ragged=ragged, total_ref=total_ref)[0]
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


library.impl("attention_mass", _mass, "CompositeExplicitAutograd")
library.impl("attention_mass_varlen", _mass_varlen, "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_ref_attn::attention_mass", lib=library)
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


@torch.library.register_fake("sparse_ref_attn::attention_mass_varlen", lib=library)
def _(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, cu_ref: Tensor, ref_starts: Tensor, total_ref: int, *rest: object
) -> Tensor:
    return q.new_empty((q.shape[1], total_ref), dtype=torch.float32)


mass_op = torch.ops.sparse_ref_attn.attention_mass.default
mass_varlen_op = torch.ops.sparse_ref_attn.attention_mass_varlen.default


Launchers = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def _cuda(q: Tensor) -> Launchers:
    from .impl.cuda import launch_lse, launch_mass

    return launch_lse, launch_mass


def _triton(q: Tensor) -> Launchers:
    from .impl import triton_mass

    tables = ((triton_mass.launch_lse, LSE), (triton_mass.launch_mass, MASS))
    of_lse, of_mass = (partial(f, config=config_for(table, capability_of(q), q.shape[-1])) for f, table in tables)
    return of_lse, of_mass


LAUNCHERS: dict[str, Callable[[Tensor], Launchers]] = {"triton": _triton, "cuda": _cuda}
"""The launchers of the LSE and of the mass, for these queries."""
