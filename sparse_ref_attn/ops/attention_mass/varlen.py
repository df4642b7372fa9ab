"""The public door for packed rows: items of unequal length, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import LayoutError
from .registered import mass_varlen_op

__all__ = ["attention_mass_varlen"]


def attention_mass_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_ref: Tensor,
    ref_starts: Tensor,
    total_ref: int,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_ref: int | None = None,
    scale: float | None = None,
    query_stride: int = 1,
    lse: Tensor | None = None,
    reduce_heads: bool = False,
    backend: str = "auto",
    check: bool = False,
    host: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    r"""`attention_mass` of a ragged batch: each item its own queries, keys and references.

    .. math:: s_{h,r} = \frac{1}{N_i} \sum_{j \in i} \exp(a \langle q_{hj}, k_{hr} \rangle - \mathrm{lse}_{hj})

    for every reference row r of item i, N_i its number of queries.

    Parameters
    ----------
    q : Tensor, shape (T, H, C), float16 | bfloat16 | float32
        Queries of all items, after QK-norm and RoPE.
    k : Tensor, shape (T_k, H, C), dtype of `q`
        Keys of all items, after QK-norm and RoPE.
    cu_seqlens_q, cu_seqlens_k, cu_seqlens_ref : Tensor, shape (B + 1,), int32
        Where each item's queries, keys and reference tokens begin, and the end.
    ref_starts : Tensor, shape (B,), int32
        The row of `k` at which each item's references begin; they are consecutive.
    total_ref : int
        The last entry of `cu_seqlens_ref`, known to the host.
    max_seqlen_q, max_seqlen_ref : int, optional
        The longest item's lengths. Default all rows, which launches more programs than needed.
    scale : float, optional
        The score scale ``a``. Default ``C ** -0.5``.
    query_stride : int
        Use every n-th query of each item only. Default 1, all.
    lse : Tensor, shape (H, T), float32, optional
        Natural-log LSE of every query. Default: computed here.
    reduce_heads : bool
        Return the mean over the heads. Default False.
    backend : {"auto", "reference", "chunked", "triton", "cuda"}
        As in `attention_mass`.
    check : bool
        Check the values of offsets and bounds with "triton" and "cuda" on CUDA too, which waits for the device. Every
        other call checks them anyway. Unchecked, a wrong one reads outside the tensors. Default False.
    host : four sequences of int, optional
        What cu_seqlens_q, cu_seqlens_k, cu_seqlens_ref and ref_starts hold, where the host knows it: then no backend
        reads them from the device. They are believed, unless `check` is set.

    Returns
    -------
    Tensor, shape (H, total_ref), or (total_ref,) with `reduce_heads`, float32
        References of all items, one after another. An item without queries gets zeros.

    Raises
    ------
    LayoutError
        If shapes, dtypes or devices disagree, offsets do not tile their rows, an item's references do not lie
        among its keys, or an item is longer than its bound.
    ConfigError
        If the backend cannot do the call; the message says why.

    Notes
    -----
    Not differentiable. Deterministic. "triton" and "cuda" make no host sync, unless asked to check. The other backends
    sync once to read the offsets, unless `host` tells them.

    Examples
    --------
    Two items of 1 and 2 queries, 4 equal keys each, of which the last 1 and 2 are references:

    >>> import torch
    >>> i = lambda *x: torch.tensor(x, dtype=torch.int32)
    >>> q, k = torch.zeros(3, 1, 16), torch.zeros(8, 1, 16)
    >>> attention_mass_varlen(q, k, i(0, 1, 3), i(0, 4, 8), i(0, 1, 3), i(3, 6), 3)
    tensor([[0.2500, 0.2500, 0.2500]])
    """
    if q.ndim != 3 or k.ndim != 3 or q.shape[1:] != k.shape[1:]:
        raise LayoutError(
            f"q (T, H, C) and k (T_k, H, C) must agree in H and C, got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise LayoutError(f"q and k must share a floating dtype, got {q.dtype} and {k.dtype}")
    items = ref_starts.shape[0]
    for name, x, rows in (
        ("cu_seqlens_q", cu_seqlens_q, items + 1),
        ("cu_seqlens_k", cu_seqlens_k, items + 1),
        ("cu_seqlens_ref", cu_seqlens_ref, items + 1),
        ("ref_starts", ref_starts, items),
    ):
        if x.shape != (rows,) or x.dtype != torch.int32 or x.device != q.device or not x.is_contiguous():
            raise LayoutError(
                f"{name} must be ({rows},) int32, contiguous, on {q.device}, "
                f"got {tuple(x.shape)}, {x.dtype} on {x.device}"
            )
    if k.device != q.device:
        raise LayoutError(f"q and k must share a device, got {q.device} and {k.device}")
    if query_stride < 1:
        raise LayoutError(f"query_stride must be at least 1, got {query_stride}")
    rows_of_lse = (q.shape[1], q.shape[0])
    if lse is not None and (lse.shape != rows_of_lse or lse.dtype != torch.float32 or lse.device != q.device):
        raise LayoutError(
            f"lse must be (H, T) = {rows_of_lse}, float32 on {q.device}, "
            f"got {tuple(lse.shape)}, {lse.dtype} on {lse.device}"
        )
    if host is not None and [len(x) for x in host] != [items + 1] * 3 + [items]:
        raise LayoutError(
            f"host must hold three times {items + 1} and {items} numbers, got {' and '.join(str(len(x)) for x in host)}"
        )
    mass = mass_varlen_op(
        q.detach(),
        k.detach(),
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_ref,
        ref_starts,
        total_ref,
        q.shape[0] if max_seqlen_q is None else max_seqlen_q,
        total_ref if max_seqlen_ref is None else max_seqlen_ref,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        lse,
        query_stride,
        backend,
        check,
        None if host is None else [int(number) for numbers in host for number in numbers],
    )
    return mass.mean(dim=0) if reduce_heads else mass
